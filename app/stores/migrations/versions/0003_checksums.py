"""Checksums of files' content; what was stored before has none."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for table in ("file_chunks", "batch_lines"):
        op.add_column(table, sa.Column("crc32", sa.BigInteger))
