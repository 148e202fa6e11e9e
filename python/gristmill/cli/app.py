"""The command `gristmill`: its options, its subcommands, and how errors end it."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import gristmill
from gristmill.cli import adapt, bench, compress, embed, inspect, kernels, run, sensitivity, serve, show_demo, train
from gristmill.errors import GristmillError


class Commands(TyperGroup):
    """Ends with one line for an expected error, and quietly after Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output left; typer ends quietly
        except (GristmillError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from error
        except MemoryError as error:
            if ctx.params.get("debug"):
                raise
            print(f"error: not enough memory: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from error


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gristmill {gristmill.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="GRISTMILL_DEBUG", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Train a model over many workers, compress it, adapt it at the edge and serve it, on plain CPUs."""


app.command(epilog="Example: gristmill train --data train.npz --layers 512,256 --workers 2 --out model.safetensors")(train.train)
app.command(
    epilog="Example: gristmill compress --model model.safetensors --data train.npz --prune 0.8 --distill 30 --quantize int8 "
    "--max-drop 0.01 --out small.safetensors"
)(compress.compress)
app.command(epilog="Example: gristmill sensitivity --model model.safetensors --calibration sentences.txt --plot sensitivity.png")(
    sensitivity.sensitivity
)
app.command(
    epilog="Example: gristmill adapt --model small.safetensors --data local.npz --memory 4MiB --update bias "
    "--out adapted.safetensors"
)(adapt.adapt)
app.command(epilog="Example: gristmill serve digits=small.safetensors --http-port 8080 --grpc-port 8081")(serve.serve)
app.command(epilog="Example: gristmill embed all-MiniLM-L6-v2 --input sentences.txt --output vectors.npy --precision int8")(
    embed.embed
)
app.command(epilog="Example: gristmill run small.safetensors --data inputs.npz --out outputs.npz")(run.run)
app.command(epilog="Example: gristmill inspect small.safetensors")(inspect.inspect)
app.command(epilog="Example: GRISTMILL_ISA=avx2 gristmill kernels")(kernels.kernels)
app.command(epilog="Example: gristmill demo --json figures.json")(show_demo.demo)
app.command(epilog="Example: gristmill bench --quick --json figures.json --plot figures.png")(bench.bench)
