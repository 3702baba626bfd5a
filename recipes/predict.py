"""Labels, probabilities and energies of a folder of images, or of one, as a table.

    python recipes/predict.py runs/digits ./photos                                    # predictions.csv
    python recipes/predict.py timm:resnet18.a1_in1k ./photos --output photos.jsonl    # any timm model
    python recipes/predict.py timm:resnet18.a1_in1k ./photos --reference ./held_out   # and which images are unlike those

One row an image, in the order of their names, folders within folders included: file, label, y (the label's number), p, energy,
percentile, outlier, error. An image that can't be read has its error in the last column and stops nothing, but the exit code
is then 1. The table is there as a whole at the end, or not at all. A .json file holds a list of rows, a .jsonl file one row in
each line.
"""

import csv
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from accelerate import PartialState

from timm_jem import JEM, InputError, Prediction
from timm_jem.command_line import make_parser, parse_flags, read_flags
from timm_jem.data.folders import is_image, visible_files
from timm_jem.data.sources import told_kinds
from timm_jem.decoding import BrokenImage
from timm_jem.errors import check_whole, one_line, quoted
from timm_jem.evaluation.subject import load_model
from timm_jem.files import cores, replaced_file
from timm_jem.heap import keep_freed_memory
from timm_jem.preprocessing import trained_here
from timm_jem.progress import tqdm
from timm_jem.shell import check_one_process, one_line_errors

COLUMNS = ("file", "label", "y", "p", "energy", "percentile", "outlier", "error")
Row = dict[str, Any]


def write_csv(rows: Iterator[Row], file: IO[str]) -> None:
    # Before Python 3.13 a "\r" in a cell is quoted only where lines end in one.
    lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
    writer = csv.writer(lines, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(str(value).lower() if isinstance(value, bool) else value for value in row.values())


def write_json(rows: Iterator[Row], file: IO[str]) -> None:
    lead = "[\n"
    for row in rows:
        file.write(lead + json.dumps(row))
        lead = ",\n"
    file.write("[]\n" if lead == "[\n" else "\n]\n")


def write_jsonl(rows: Iterator[Row], file: IO[str]) -> None:
    for row in rows:
        file.write(json.dumps(row) + "\n")


WRITERS: dict[str, Callable[[Iterator[Row], IO[str]], None]] = {".csv": write_csv, ".json": write_json, ".jsonl": write_jsonl}


def check_output(output: Path, overwrite: bool) -> None:
    """Raise an InputError, before any work, unless a table can be written there."""
    if output.suffix.lower() not in WRITERS:
        raise InputError(f"output is {quoted(str(output))}: give a file that ends in {', '.join(WRITERS)}")
    if os.path.lexists(output) and not output.is_file():
        raise InputError(f"output {output} is there and is no file: give another")
    if output.exists() and not overwrite:
        raise InputError(f"output {output} is there already: give another, or --overwrite true")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise InputError(f"output {output} can't be written to {output.parent}: give a folder that is there and can be written")


def find_images(images: Path) -> tuple[list[Path], dict[Path, str], Counter]:
    """Images below a folder, relative to it and sorted; folders that can't be listed, and why; other files, by extension.

    Raises:
        InputError: there is no such folder, or nothing in it that could be an image.
    """
    if images.is_file():
        return [Path(images.name)], {}, Counter()
    if not images.is_dir():
        raise InputError(f"there is no folder and no file {images}: give images")
    refused: dict[Path, str] = {}
    files = list(visible_files(images, lambda path, error: refused.update({path: one_line(error)})))
    found = sorted((path for path in files if is_image(path)), key=str)
    others = Counter(path.suffix.lower() or path.name for path in files if not is_image(path))
    if not found and not refused:
        passed_over = f" among {', '.join(f'{n:,} {kind}' for kind, n in sorted(others.items())[:10])}" if others else ""
        raise InputError(f"{images} has no images{passed_over}: give a folder of images")
    return found, refused, others


def row_of(file: Path, outcome: Prediction | BrokenImage | str) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    row["file"] = file.as_posix()
    if isinstance(outcome, Prediction):
        row |= {name: getattr(outcome, name) for name in COLUMNS[1:-1]}
    else:
        row["error"] = str(outcome).removeprefix(f"{getattr(outcome, 'what', '')} ")
    return row


def fit_reference(jem: JEM, images: Path, **options: int) -> None:
    """Compare other images with those of a folder; a temperature that the model has is kept."""
    files, refused, _ = find_images(images)
    if refused:
        raise InputError(f"reference {images / next(iter(refused))} can't be listed: {next(iter(refused.values()))}")
    before = jem.reference
    batches = jem.predictor().inputs(placed(images, files), **options)
    jem.fit_reference(tqdm(batches, total=-(-len(files) // options["batch_size"]), desc="reference", leave=False))
    if before is not None:
        jem.reference = replace(jem.reference, temperature=before.temperature)


def placed(images: Path, files: list[Path]) -> list[Path]:
    return [(images.parent if images.is_file() else images) / file for file in files]


def about(jem: JEM, name: str) -> str:
    """How images are taken, and with what they are compared."""
    taken = "as in its training" if trained_here(jem.provenance) else "as timm's configuration says"
    if jem.reference is None:
        compared = (
            "no reference: p is not calibrated and nothing is told of outliers, unless --reference names images to compare"
        )
    else:
        temperature, why = jem.reference.temperature, jem.reference.uncalibrated
        own = f"p is not calibrated but the network's own: {why}"
        calibrated = own if temperature is None else f"p is calibrated, temperature {temperature:.3g}"
        n, accept = jem.reference.n, jem.reference.accept
        accepted = "all" if math.ceil(n * accept) == n else f"{accept:.0%}"  # too few to leave some out
        compared = f"compared with {n:,} held-out images, of which {accepted} are accepted; "
        compared += calibrated
    return f"{name}: images are taken {taken}; {compared}"


def parse(argv: list[str]) -> Any:
    parser = make_parser("predict", __doc__.splitlines()[0])
    parser.add_argument("model", type=str, help="a run, a saved folder, a Hub name, or timm:NAME")
    parser.add_argument("images", type=str, help="a folder of images, with all folders in it, or one image")
    parser.add_argument("--output", type=str, default="predictions.csv", help="a file that ends in .csv, .json or .jsonl")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the output that is there")
    parser.add_argument(
        "--reference", type=str | None, default=None, help="held-out images to compare with, for models that have none"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images through the network at once")
    parser.add_argument("--workers", type=int | None, default=None, help="threads that decode images; default: one a core")
    settings = parse_flags(parser, read_flags(parser, argv))
    check_whole("batch_size", settings.batch_size, 1)
    check_whole("workers", 0 if settings.workers is None else settings.workers, 0)
    return settings


def main(argv: list[str]) -> str | None:
    """Returns the exit message, where an image could not be read."""
    settings = parse(argv)
    check_one_process("a prediction")
    keep_freed_memory()
    output, images = Path(settings.output), Path(settings.images)
    check_output(output, settings.overwrite)
    files, refused, others = find_images(images)
    jem = load_model(settings.model).to(PartialState().device)
    options = {"batch_size": settings.batch_size, "workers": cores() if settings.workers is None else settings.workers}
    counts: Counter = Counter()

    def rows() -> Iterator[Row]:
        outcomes = jem.predictor().stream(placed(images, files), **options)
        for file, outcome in zip(files, tqdm(outcomes, total=len(files), desc="images", leave=False), strict=True):
            counts.update(outliers=bool(getattr(outcome, "outlier", None)), broken=isinstance(outcome, BrokenImage))
            yield row_of(file, outcome)
        for folder, why in refused.items():
            counts.update(broken=1)
            yield row_of(folder, f"can't be listed: {why}")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of large images, odd palettes: whatever can be read is
        if settings.reference is not None:
            fit_reference(jem, Path(settings.reference), **options)
        print(about(jem, settings.model), flush=True)
        with replaced_file(output) as aside, open(aside, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            WRITERS[output.suffix.lower()](rows(), file)
    if others:
        print(f"passed over {told_kinds(others)}")
    outliers = "" if jem.reference is None else f", {counts['outliers']:,} outlier{'s' * (counts['outliers'] != 1)}"
    total, broken = len(files) + len(refused), counts["broken"]
    print(f"{total:,} row{'s' * (total != 1)}{outliers}, {broken:,} with errors: {output}")
    return f"{broken:,} of {total:,} could not be read: see error in {output}" if broken else None


if __name__ == "__main__":
    with one_line_errors(stopped="interrupted: no predictions are written", less="lower --batch_size or --workers"):
        not_read = main(sys.argv[1:])
    sys.exit(not_read)
