"""Kept texts belong to versions. Those that are there go to the first version of their content, which brought them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "version_texts",
        sa.Column(
            "version_seq",
            _SERIAL,
            sa.ForeignKey("versions.seq", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.execute(
        "INSERT INTO version_texts (version_seq, data) "
        "SELECT (SELECT MIN(seq) FROM versions WHERE versions.id = payloads.id), documents FROM payloads "
        "WHERE documents IS NOT NULL AND id IN (SELECT id FROM versions)"
    )
    op.drop_column("payloads", "documents")
