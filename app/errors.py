"""Everything that can go wrong on purpose. Knows no HTTP: `app/api/openai_errors.py` maps each class to a status.

ServiceError
├── InvalidRequest
│   ├── ContextLengthExceeded
│   ├── TooManyTokens
│   ├── UnknownParameter
│   ├── TokenIdsNotAccepted
│   ├── ContextModelMismatch
│   ├── ContextRequired
│   ├── ContextInUse
│   ├── UnknownContextNamed
│   └── FirstStageUnavailable
├── NotFound
│   ├── ModelNotFound
│   └── ContextNotFound
├── Unauthenticated
├── InsufficientScope
├── FingerprintMismatch
├── RequestTooLarge
├── HeadersTooLarge
├── RequestTimeout
├── UnsupportedMediaType
├── RetryableError
│   ├── QueueFull
│   ├── TooManyBatches
│   ├── BodiesFull
│   ├── BuildsFull
│   └── Unavailable
│       ├── NotReady
│       ├── ContextNotReady
│       ├── DeadlineExceeded
│       ├── ShuttingDown
│       ├── TooManyConnections
│       └── EngineUnavailable
│           └── OutOfDeviceMemory
└── ServerFault
    └── NonFiniteEmbedding
StartupError
├── ConfigError
├── CheckpointError
└── SelfCheckError
StoreError, whose kinds are in stores/errors.py
"""

from typing import ClassVar


class ServiceError(Exception):
    """An answer to a caller. `message` says what was wrong and what to do next; `param` names the field, if one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(ServiceError):
    """The request cannot be served as it is; `message` says which field and why."""


class ContextLengthExceeded(InvalidRequest):
    """A text is longer than the model takes, and cutting was not asked for."""

    def __init__(self, message: str, *, param: str | None = None, index: int = 0) -> None:
        """`index`: which of the texts it is, from 0."""
        super().__init__(message, param=param)
        self.index = index


class TooManyTokens(InvalidRequest):
    """All texts together are more than one request may hold."""


class UnknownParameter(InvalidRequest):
    """An unknown field in the body; null counts as absent."""


class TokenIdsNotAccepted(InvalidRequest):
    """Integers in `input` where they cannot be read."""


class ContextModelMismatch(InvalidRequest):
    """The context was made for another model, or other weights of it."""


class ContextRequired(InvalidRequest):
    """No context was named, and there is none to fall back on."""


class ContextInUse(InvalidRequest):
    """The version a name points at cannot be deleted alone, nor the default context at all."""


class UnknownContextNamed(InvalidRequest):
    """A context named in the body or a header does not exist, or could not be built."""


class FirstStageUnavailable(InvalidRequest):
    """The model is served without its first stage: contexts by import only."""


class NotFound(ServiceError):
    """Nothing is there."""


class ModelNotFound(NotFound):
    """The model is not served here."""


class ContextNotFound(NotFound):
    """A context named in the path or the model name does not exist."""


class Unauthenticated(ServiceError):
    """The key is missing or wrong."""


class InsufficientScope(ServiceError):
    """The key is right, and not allowed to do this."""


class FingerprintMismatch(ServiceError):
    """`x-expect-fingerprint` names another vector space."""


class RequestTooLarge(ServiceError):
    """The body is over the limit."""


class HeadersTooLarge(ServiceError):
    """Request line and headers together are over the limit."""


class RequestTimeout(ServiceError):
    """The request stopped arriving, or arrived too slowly; the connection is closed."""


class UnsupportedMediaType(ServiceError):
    """This path does not take that Content-Type, or the body is compressed."""


class RetryableError(ServiceError):
    """The same request may succeed after `retry_after` seconds."""

    def __init__(self, message: str, *, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class QueueFull(RetryableError):
    """The queue has no room for the whole request."""


class TooManyBatches(RetryableError):
    """The namespace has too many unfinished batches."""


class BodiesFull(RetryableError):
    """The caller's requests and answers already hold their share of bytes."""


class BuildsFull(RetryableError):
    """Too many contexts are being made."""


class Unavailable(RetryableError):
    """The server cannot answer now."""


class NotReady(Unavailable):
    """The server is starting or has failed, or its last batch did."""


class ContextNotReady(Unavailable):
    """The context is still being built."""


class DeadlineExceeded(Unavailable):
    """The request was not, or would not be, answered within its time."""


class ShuttingDown(Unavailable):
    """The server is shutting down."""


class TooManyConnections(Unavailable):
    """Too many connections are open."""


class EngineUnavailable(Unavailable):
    """The device does not answer."""


class OutOfDeviceMemory(EngineUnavailable):
    """The device had no room for this input, even alone."""


class ServerFault(ServiceError):
    """Our fault; the log has the details under the request id."""


class NonFiniteEmbedding(ServerFault):
    """The model gave NaN or infinity for this input."""


class StartupError(Exception):
    """The process cannot start. The message is for the operator and stands alone."""


class ConfigError(StartupError):
    """The settings are wrong."""


class CheckpointError(StartupError):
    """The checkpoint cannot be loaded."""


class SelfCheckError(StartupError):
    """A loaded model gives other vectors than its checkpoint is known to give, or none."""


class StoreError(Exception):
    """The context store cannot answer."""

    kind: ClassVar[str] = "unknown"
    """Its name in metrics and logs."""
    answer: str = "The context store cannot answer at the moment. Please try again."
    """What a caller is told; the exception's own text is for the operator, and may name hosts and paths."""
    passes: ClassVar[bool] = True
    """Whether the same call may go well later, in `retry_after` seconds at the earliest, with nothing repaired."""
    retry_after: float = 1.0
