"""`tailrace export`: released versions for browsers, phones and other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infra.commands import options
from infra.console import print_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from infra.export.folder import ExportManifest
    from infra.export.tables import Numbers

Command = Callable[..., Any]

_out = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="A new or empty folder."
)
_version = click.argument("version", default="serving")


def item_options(command: Command) -> Command:
    """--items, --log and --numbers of a bundle."""
    for option in (
        click.option(
            "--numbers",
            type=click.Choice(["int8", "int16", "f32"]),
            help="How table rows are kept; the smallest that keeps scores within 5e-4 otherwise.",
        ),
        click.option(
            "--log",
            type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
            help="Says which items are popular.",
        ),
        click.option(
            "--items",
            default="all",
            show_default=True,
            help="How many of the most popular items; all of them.",
        ),
    ):
        command = option(command)
    return command


@click.group()
def export() -> None:
    """A released version for other places than our own servers.

    VERSION is a version or an alias, its signature and files are checked first, and the largest
    difference from ONNX Runtime on the published graphs is printed.

    \b
    tailrace export edge --out edge                    a folder that ranks in a browser
    tailrace export openvino --out ir --numbers f16    OpenVINO's .xml and .bin
    tailrace export tensorrt --out trt --numbers int8  ONNX that TensorRT builds its plans from
    tailrace export litert --out phone                 a .tflite for phones
    """


@export.command()
@_version
@_out
@item_options
@options.registry
@options.one_json
def edge(
    *,
    version: str,
    out: Path,
    items: str,
    log: Path | None,
    numbers: Numbers | None,
    registry: Path,
    as_json: bool,
) -> None:
    """A self-contained folder that ranks candidates in a browser: any web server can hand it out.

    With --items N the client knows the N items most often met in --log; it treats others as the server
    treats items it has never seen.

    \b
    tailrace export edge --out edge && python -m http.server -d edge
    tailrace export edge 20171203T101500-3f9c --items 10000 --log clicks.csv --out edge
    """
    from infra.export.edge import export as write

    with _sentences():
        manifest = write(_open(registry, version), out, items=popular_items(items, log), numbers=numbers)
    total = sum(entry.bytes for entry in manifest.files.values())
    if as_json:
        print_json({"out": str(out), "bytes": total} | manifest.model_dump(by_alias=True))
        return
    for name, entry in manifest.files.items():
        click.echo(f"{entry.bytes / 1e6:10.3f} MB  {name}")
    click.echo(f"{total / 1e6:10.3f} MB  together, in {out}")
    click.echo(
        f"{manifest.version}: {manifest.items:,} items, rows in {manifest.numbers}, "
        f"scores within {manifest.max_difference:.1e} of the published graph's"
    )


@export.command()
@_version
@_out
@click.option("--numbers", type=click.Choice(["f32", "f16", "int8"]), default="f32", show_default=True)
@options.registry
@options.one_json
def openvino(*, version: str, out: Path, numbers: Any, registry: Path, as_json: bool) -> None:
    """Every graph as OpenVINO IR, .xml and .bin; f16 and int8 are how weights are kept.

    \b
    tailrace export openvino --out ir
    tailrace export openvino 20171203T101500-3f9c --numbers int8 --out ir-int8
    """
    with _sentences(), _needs("openvino", "openvino"):
        from infra.export.openvino_ir import export as write

        _report(write(_open(registry, version), out, numbers=numbers), out, as_json)


@export.command()
@_version
@_out
@click.option("--numbers", type=click.Choice(["f16", "int8"]), default="f16", show_default=True)
@options.registry
@options.one_json
def tensorrt(*, version: str, out: Path, numbers: Any, registry: Path, as_json: bool) -> None:
    """Every graph as ONNX that TensorRT builds a plan from, f16 or int8 with ranges in it.

    The plan itself fits one GPU and one version of TensorRT, so it is built on the host that serves: by our
    engine when it is warmed, or with the trtexec command that the manifest holds for each graph.

    \b
    tailrace export tensorrt --out trt
    tailrace export tensorrt --numbers int8 --out trt-int8 && jq -r .graphs.rank.build trt-int8/manifest.json
    """
    with _sentences(), _needs("onnxruntime", "onnx"):
        from infra.export.tensorrt_onnx import export as write

        _report(write(_open(registry, version), out, numbers=numbers), out, as_json)
    if not as_json:
        click.echo("plans are built on the host that serves: manifest.json has the command for each graph")


@export.command()
@_version
@_out
@options.registry
@options.one_json
def litert(*, version: str, out: Path, registry: Path, as_json: bool) -> None:
    """The rank graph for phones: a LiteRT model (.tflite) of one user and 50 candidates.

    The converter is installed under .tailrace the first time (1 GB). Histories are padded to the longest;
    `lengths` says how many events there are.

    \b
    tailrace export litert --out phone
    """
    with _sentences(), _needs("torch", "train"):
        from infra.export.litert import export as write

        _report(write(_open(registry, version), out), out, as_json)


def _report(manifest: ExportManifest, out: Path, as_json: bool) -> None:
    """Size and difference of each graph."""
    total = sum(entry.bytes for entry in manifest.files.values())
    if as_json:
        print_json({"out": str(out), "bytes": total} | manifest.model_dump())
        return
    for graph in manifest.graphs.values():
        size = sum(manifest.files[file].bytes for file in graph.files)
        files = ", ".join(graph.files)
        click.echo(
            f"{size / 1e6:10.3f} MB  {files}, within {graph.max_difference:.1e} of the published graph"
        )
    click.echo(f"{total / 1e6:10.3f} MB  together, {manifest.numbers}, in {out}")


def popular_items(items: str, log: Path | None) -> npt.NDArray[np.int64] | None:
    """The ids of the N items met most often in a log; None for all that a version knows."""
    if items == "all":
        return None
    if not items.isdecimal() or int(items) == 0:
        raise click.UsageError("--items takes a number, or all")
    if log is None:
        raise click.UsageError("--items N needs --log FILE, which says what is popular")
    import numpy as np

    from compression.logs.dataset import read_log
    from compression.logs.log_reader import LogInvalid

    try:
        met = read_log(log).sequences.items
    except LogInvalid as error:
        raise click.ClickException(str(error)) from None
    ids, counts = np.unique(met, return_counts=True)
    return ids[np.argsort(-counts, kind="stable")[: int(items)]]


@contextmanager
def _sentences() -> Iterator[None]:
    """What cannot be exported is a sentence, not a traceback."""
    from compression.releases.registry import ArtefactInvalid
    from inference.errors import InferenceError
    from infra.export.folder import ExportFailed
    from infra.export.onnxruntime_web import RuntimeMissing

    try:
        yield
    except (ArtefactInvalid, InferenceError, ExportFailed, RuntimeMissing) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename} cannot be written: {error.strerror}") from None


@contextmanager
def _needs(library: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise
        raise click.ClickException(f"{library} is missing: pip install 'tailrace[{extra}]'") from None


def _open(registry: Path, version: str) -> Any:
    from compression.releases.registry import Registry

    return Registry(registry).open(version)
