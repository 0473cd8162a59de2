"""`funnel serve`: an HTTP server with a JSON API and a web page for text classifiers."""

import argparse
import dataclasses
import warnings
from pathlib import Path

from funnel.cli.classifier import add_device_arguments
from funnel.cli.common import ArgumentParser, add_options
from funnel.errors import plural, requires_extra
from funnel.serving.settings import TOKEN_VARIABLE, Settings, read_token


def add_serve(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="HTTP server with a web page for text classifiers (extra: serve)",
        description="Serves text classifiers: a web page to try them, a JSON API (/docs), and Prometheus metrics (/metrics).",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run or checkpoint folder, or a folder with an ONNX export")  # fmt: skip
    add_device_arguments(parser)
    add_options(parser, Settings)
    parser.set_defaults(work=serve)


def serve(args: argparse.Namespace) -> None:
    """Loads the models, then serves them until SIGTERM or Ctrl-C."""
    given = vars(args)
    settings = Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings) if field.name in given})
    token = read_token(settings.token_file)
    with requires_extra("serve", "the server"):
        from funnel.serving import server
    import torch

    from funnel.serving.engines import load_models
    from funnel.serving.service import Service

    with server.bind(settings) as listener:
        if token is None and not server.is_loopback(listener):
            hint = f"set {TOKEN_VARIABLE} or --token-file"
            warnings.warn(f"anyone who can reach {server.url_of(listener)} can use this server; {hint}", stacklevel=1)
        models = load_models(args.runs, given.get("device"), given.get("dtype"))
        service = Service(models, settings, token, only_local=token is None and server.is_loopback(listener))
        service.start()
        for model in models:
            description = model.describe()
            print(f"model {model.name}: {description['problem']}, layout {description['blocks']}, {model.engine}")
        listener.listen(server.BACKLOG)  # before the address is printed: who reads it may connect
        access = "" if token is None else ", token required"
        print(
            f"serving on {server.url_of(listener)}{access}, {plural(torch.get_num_threads(), 'thread')}; Ctrl-C stops",
            flush=True,
        )
        server.run(service, listener)
