"""Load a checkpoint that the authors of JEM, JEM++, SADA-JEM, M-JEM, VERA or DAT released, for timm and timm_jem.

    python recipes/convert.py jem_cifar10.pt models/jem --method jem
    python recipes/convert.py sadajem10.pt models/sada --method sada --num_steps 10
    python recipes/convert.py robust.pt models/robust --mean '[0, 0, 0]' --std '[1, 1, 1]' --energies none

No code of the file is run. Every tensor of it is used or known to be needless, or the file is refused by that tensor's name;
depth, width and number of classes are those of its shapes. The folder is what timm_jem.from_pretrained and plain timm read.
"""

import sys
from pathlib import Path

from timm_jem import InputError
from timm_jem.command_line import make_parser, parse_flags, read_flags
from timm_jem.conversion import METHODS, convert
from timm_jem.errors import program
from timm_jem.files import as_path
from timm_jem.hub.reading import CONFIG_FILE, WEIGHTS_FILE
from timm_jem.shell import one_line_errors


def main(argv: list[str]) -> None:
    parser = make_parser("convert", __doc__.splitlines()[0])
    parser.add_argument("file", type=str, help="the authors' checkpoint")
    parser.add_argument("output", type=str, help="folder for the model")
    parser.add_argument(
        "--method", type=str | None, default=None, help=f"whose: {', '.join(METHODS)}; default: as the file tells"
    )
    parser.add_argument("--entry", type=str | None, default=None, help="of the file, where it has several weights")
    parser.add_argument("--energies", type=str | None, default=None, help="logsumexp, or none: the classifier alone")
    parser.add_argument("--conditional_chains", type=bool, default=False, help="it was trained with chains of E(x, y)")
    parser.add_argument("--num_steps", type=int | None, default=None, help="of a chain; default: the method's")
    parser.add_argument("--mean", type=list[float] | None, default=None, help="of its input, in [0, 1]; default: the method's")
    parser.add_argument("--std", type=list[float] | None, default=None, help="of its input, in [0, 1]; default: the method's")
    parser.add_argument("--replay_buffer", type=bool, default=True, help="with its chains, if the file has some")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace a model that is in the folder")
    given = vars(parse_flags(parser, read_flags(parser, argv)))
    options = {key: value for key, value in given.items() if key not in ("config", "output", "overwrite")}
    output = as_path(given["output"])
    check_output(output, given["overwrite"])
    found = convert(**options)
    found.jem.save_pretrained(output)
    print(f"{output}: {METHODS[found.method].title}")
    print(*(f"  {line}" for line in found.lines), sep="\n")
    data = {10: "cifar10", 100: "cifar100"}.get(found.jem.num_classes, "DATA")  # what the authors trained on
    print(f"next: {program('evaluate')} {output} --data.dataset {data}")


def check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: give a folder for the model")
    for name in (CONFIG_FILE, WEIGHTS_FILE, "config.yaml"):
        if not overwrite and (output / name).exists():
            raise InputError(f"{output} holds another model: give a new folder, or --overwrite true")


if __name__ == "__main__":
    with one_line_errors(stopped="interrupted; nothing was written", less="give it more"):
        main(sys.argv[1:])
