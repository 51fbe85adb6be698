"""What can go wrong between a request and its list, each with the gRPC status it maps to."""

from __future__ import annotations


class InferenceError(RuntimeError):
    """Base: nothing else leaves this folder on purpose."""

    grpc_status = "INTERNAL"


class Overloaded(InferenceError):
    """The queue is full. Raised at once; asking again later may work."""

    grpc_status = "RESOURCE_EXHAUSTED"


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
