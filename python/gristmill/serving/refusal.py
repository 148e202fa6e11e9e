"""Why a request is turned away, in the words of both protocols."""

from enum import Enum


class Reason(Enum):
    """A kind of refusal: the HTTP status and the name of the gRPC status code."""

    INVALID = (400, "INVALID_ARGUMENT")
    UNAUTHENTICATED = (401, "UNAUTHENTICATED")
    NOT_FOUND = (404, "NOT_FOUND")
    METHOD = (405, "UNIMPLEMENTED")
    SLOW = (408, "DEADLINE_EXCEEDED")
    TOO_LARGE = (413, "RESOURCE_EXHAUSTED")
    UNSUPPORTED_ENCODING = (415, "UNIMPLEMENTED")
    INTERNAL = (500, "INTERNAL")
    OVERLOADED = (503, "RESOURCE_EXHAUSTED")
    EXPIRED = (504, "DEADLINE_EXCEEDED")

    @property
    def status(self) -> int:
        return self.value[0]

    @property
    def code(self) -> str:
        return self.value[1]


class Refusal(Exception):
    """An answer that is not a result. The message goes to the client: it never holds anything of the server's insides."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class ClientGone(Exception):
    """The client went away: there is nobody to answer."""


def need(condition: bool, message: str, reason: Reason = Reason.INVALID) -> None:
    """Raise a Refusal unless the condition holds."""
    if not condition:
        raise Refusal(reason, message)
