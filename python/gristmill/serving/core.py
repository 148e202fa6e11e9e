"""What both protocols share: requests as validated arrays, the way to a session and back, and the server's state."""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from gristmill.serving.dispatch import Dispatcher, Gone
from gristmill.serving.limits import MAX_TENSORS, Limits
from gristmill.serving.refusal import ClientGone, Reason, Refusal, need
from gristmill.serving.registry import HostedModel, Port, Registry
from gristmill.serving.tensors import Array

log = logging.getLogger("gristmill.serving")

SERVER_NAME = "gristmill"
EXTENSIONS = ["binary_tensor_data"]
Parameters = Mapping[str, bool | int | float | str | None]
# They change what a request means, so to ignore them would be to answer another question.
REFUSED_PARAMETERS = ("classification", "shared_memory_region")


class Call:
    """One inference request, filled by the decoder of either protocol."""

    def __init__(self, hosted: HostedModel, limits: Limits) -> None:
        self.hosted = hosted
        self.inputs: dict[str, Array] = {}
        self.outputs: list[str] = list(hosted.outputs)
        self.timeout = limits.max_wait  # seconds
        self._limits = limits
        self._nbytes = 0

    def expect(self, name: str, datatype: str, shape: Sequence[int]) -> Port:
        """Check what a request says of an input, before its data is looked at.

        Raises:
            Refusal: the input is unknown or given twice, does not fit the model, or is too large.
        """
        port = self.hosted.inputs.get(name)
        if port is None:
            raise Refusal(Reason.INVALID, f"unknown input {_shown(name)}")
        need(name not in self.inputs, f"input '{name}' is given twice")
        port.admit(datatype, shape)
        self._nbytes += math.prod(shape) * port.dtype.itemsize  # Python integers: no overflow
        fits = self._nbytes <= self._limits.max_request_bytes
        need(fits, f"the inputs are larger than {self._limits.max_request_bytes} bytes", Reason.TOO_LARGE)
        return port

    def select(self, names: Sequence[str]) -> None:
        """Choose the outputs to return; none chosen means all.

        Raises:
            Refusal: an output is unknown or named twice.
        """
        need(len(names) <= MAX_TENSORS and len(set(names)) == len(names), "an output is requested twice")
        for name in names:
            need(name in self.hosted.outputs, f"unknown output {_shown(name)}")
        self.outputs = list(names) or self.outputs

    def parameterise(self, parameters: Parameters) -> None:
        """Take the request's parameters: `timeout` in microseconds is honoured, the others have no effect.

        Raises:
            Refusal: a parameter asks for what this server does not do.
        """
        refuse_parameters(parameters)
        timeout = parameters.get("timeout")
        if timeout is None:
            return
        whole = isinstance(timeout, int) and not isinstance(timeout, bool) and 0 <= timeout < 1 << 63
        need(whole, "parameter 'timeout' must be a number of microseconds")
        if timeout:
            self.timeout = min(self.timeout, int(timeout) / 1e6)


def refuse_parameters(parameters: Parameters) -> None:
    """Raise a Refusal if a parameter asks for what this server does not do."""
    for name in REFUSED_PARAMETERS:
        need(name not in parameters, f"parameter '{name}' is not supported")


def _shown(name: str) -> str:
    """A client's own word, short and printable."""
    return ascii(name[:64])


class Core:
    """The state of a server and the one way to run a model. To be made on the server's event loop."""

    def __init__(self, registry: Registry, limits: Limits) -> None:
        self.registry = registry
        self.limits = limits
        self.ready = False
        self.dispatcher = Dispatcher(limits.max_concurrent, limits.max_queued)
        self._loop = asyncio.get_running_loop()

    async def infer(self, call: Call, gone: Gone | None = None) -> dict[str, Array]:
        """Run a request and return the outputs it chose, in its order.

        Raises:
            Refusal: for any reason; of what went wrong inside, only the log knows more.
            ClientGone: the client left before the run began.
        """
        call.hosted.check(call.inputs)
        deadline = self._loop.time() + call.timeout
        made = await self.dispatcher.submit(_guarded(call), deadline, gone)
        return {name: made[name] for name in call.outputs}


def _guarded(call: Call) -> Callable[[], dict[str, Array]]:
    def run() -> dict[str, Array]:
        try:
            return call.hosted.run(call.inputs)
        except (Refusal, ClientGone):
            raise
        except Exception:
            log.exception("model %s failed on inputs of shapes %s", call.hosted.name, _shapes(call))
            raise Refusal(Reason.INTERNAL, "internal error") from None

    return run


def _shapes(call: Call) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in call.inputs.items()}


def version() -> str:
    """The installed version of the package."""
    try:
        return metadata.version("gristmill")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0"
