"""What can go wrong between a request and its list, each with the gRPC status it maps to."""

from __future__ import annotations


class InferenceError(RuntimeError):
    """Base: nothing else leaves this folder on purpose. `retry_after_s`: when asking again may work."""

    grpc_status = "INTERNAL"
    retry_after_s: float | None = None

    def __init__(self, *words: object, retry_after_s: float | None = None) -> None:
        super().__init__(*words)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class Overloaded(InferenceError):
    """The queue is full, or a rate is used up. Raised at once; asking again later may work."""

    grpc_status = "RESOURCE_EXHAUSTED"
    retry_after_s = 0.1


class NoRoom(Overloaded):
    """More is in hand than can be answered in time, whoever asks: another process may have room."""

    grpc_status = "UNAVAILABLE"


class DeadlineExceeded(InferenceError):
    """The deadline passed, or would pass, before an engine could answer."""

    grpc_status = "DEADLINE_EXCEEDED"


class ModelUnavailable(InferenceError):
    """No model is loaded, or the one asked for cannot be used; the message says why."""

    grpc_status = "UNAVAILABLE"


class EngineFailed(InferenceError):
    """An engine raised, or answered with the wrong shape or with numbers that are not finite."""

    grpc_status = "INTERNAL"


class InvalidRequest(InferenceError):
    """The request itself is wrong; the message says what. Asking again will not help."""

    grpc_status = "INVALID_ARGUMENT"


class ModelNotFound(InferenceError):
    """No model has this name, or not in this version."""

    grpc_status = "NOT_FOUND"
