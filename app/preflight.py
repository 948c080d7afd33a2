"""What is wrong with the settings, told before the port opens: everything that needs no weights and no network."""

import os

from app.api.auth import Keyring
from app.assembly import devices_of, options_of, served_names
from app.context_refs import parse_ref
from app.errors import CheckpointError, ConfigError, InvalidRequest, StoreError
from app.models.loading import check_options
from app.registry import check_distinct
from app.settings import Settings
from app.stores.database import parsed_url


def check(settings: Settings) -> None:
    """Raises ConfigError. Looks only: nothing is created, and nothing is asked of anybody."""
    check_distinct([served_names(model) for model in settings.models])
    for i, model in enumerate(settings.models):
        for device in devices_of(settings):
            try:
                check_options(model.name, options_of(model, device))
            except CheckpointError as error:
                raise ConfigError(f"models[{i}]: {error}") from error
    if settings.server.keys_file:
        Keyring(settings.server.keys_file)
    try:
        parse_ref(settings.contexts.default)
    except InvalidRequest as error:
        raise ConfigError(f"contexts.default {settings.contexts.default!r}: {error}") from error
    _check_store(settings)


def _check_store(settings: Settings) -> None:
    folder, url = settings.data_dir, settings.contexts.database_url
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"data_dir {folder}: {nearest} is no folder")
    if url is None and not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"data_dir {folder}: this process may not write to {nearest.resolve()}, and contexts are kept there"
        )
    if url is not None:
        try:
            parsed_url(url.get_secret_value())
        except StoreError:
            raise ConfigError(
                "contexts.database_url cannot be used; it is like postgresql://USER:PASSWORD@HOST/DATABASE"
            ) from None
