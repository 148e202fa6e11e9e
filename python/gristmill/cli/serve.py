"""`gristmill serve`."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from gristmill.errors import GristmillError

KEY_VARIABLE = "GRISTMILL_API_KEY"


def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="NAME=PATH...", help="Model files or folders; without NAME= the name is that of the file."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="For REST; 0 picks a free one.")] = 8080,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="For gRPC; 0 picks a free one.")] = 8081,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"A file with the key that clients must give; or set {KEY_VARIABLE}.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The private key (PEM).")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without a key or TLS.")] = False,
) -> None:
    """Serve models over REST and gRPC until Ctrl-C."""
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")
    paths = parse_models(models)
    key = read_key(api_key_file)
    import gristmill as gm

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    secure = "s" if tls_cert else ""
    server = gm.serve(
        {name: gm.load(path) for name, path in paths.items()},
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        api_key=key,
        tls=None if tls_cert is None or tls_key is None else (tls_cert, tls_key),
        insecure=insecure,
        block=False,
    )
    place = f"[{host}]" if ":" in host else host
    print(
        f"serving {', '.join(paths)} at http{secure}://{place}:{server.http_port} and grpc://{place}:{server.grpc_port}",
        flush=True,
    )
    server.wait()


def parse_models(texts: list[str]) -> dict[str, Path]:
    """Return paths by name from texts such as "digits=small.safetensors" or "digits.safetensors"."""
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).stem, text
        if not name or not path or name in paths:
            raise typer.BadParameter(f"{text!r}: each model needs a path and a name of its own, as in NAME=PATH")
        paths[name] = Path(path)
    return paths


def read_key(path: Path | None) -> str | None:
    """Return the key from a file or the environment. It is no option, since other users can read a process's arguments.

    Raises:
        GristmillError: the file is not text.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        return path.read_text().strip()
    except UnicodeDecodeError as error:
        raise GristmillError(f"{path} is not a text file") from error
