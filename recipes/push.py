"""Publish a run of recipes/train.py on the Hugging Face Hub: model, card, pictures and chains, in one commit.

What recipes/evaluate.py measured of it, in the run's folder evaluation, goes on the card.

python recipes/push.py runs/digits user/digits-jem
"""

import sys

import timm_jem
from timm_jem import InputError
from timm_jem.command_line import make_parser, parse_flags, read_flags
from timm_jem.evaluation.report import REPORT_FILE, read_report
from timm_jem.evaluation.subject import function_of, sampling_of
from timm_jem.files import fingerprint
from timm_jem.hub.card import PICTURES
from timm_jem.hub.provenance import Provenance
from timm_jem.shell import one_line_errors
from timm_jem.training.run_folder import RunFolder


def main(argv: list[str]) -> None:
    parser = make_parser("push", __doc__.splitlines()[0])
    parser.add_argument("run", type=str, help="a run's folder")
    parser.add_argument("repo_id", type=str, help="user/name; made if it is not there")
    parser.add_argument(
        "--private", type=bool | None, default=None, help="if it is not there yet; default: as new ones of its owner are"
    )
    parser.add_argument("--replay_buffer", type=bool, default=True, help="with the run's chains")
    parser.add_argument("--overwrite_card", type=bool, default=False, help="replace a README.md that someone wrote")
    settings = parse_flags(parser, read_flags(parser, argv))
    run = RunFolder(settings.run)
    if not run.model.is_dir():
        raise InputError(f"{run} has no folder 'model': give the folder of a finished run, such as runs/digits")
    jem, pictures = timm_jem.from_pretrained(run.model), run.pictures()
    if run.summary() is None:
        pictures = {}
        print(f"note: {run} has not come to its end: pictures that may be of other weights than its model are left out")
    evaluation = run.path / "evaluation"
    if (evaluation / REPORT_FILE).is_file():
        report = read_report(evaluation)
        if report.subject.get("weights") != fingerprint(jem.backbone.state_dict()):
            raise InputError(f"{evaluation} is of other weights than {run.model}: evaluate again, or remove it")
        if "function" in report.subject and report.subject["function"] != function_of(jem):  # earlier reports don't tell it
            raise InputError(
                f"{evaluation} is of another architecture or normalisation than {run.model}: evaluate again, or remove it"
            )
        if report.subject.get("sampling") != sampling_of(jem):
            raise InputError(f"{evaluation} is of chains with other settings than {run.model}'s: evaluate again, or remove it")
        if not report.subject.get("as_in_training"):
            raise InputError(
                f"{evaluation} is of other images than {run} held out, and a card would call them its own: evaluate again "
                "without --data, or remove it"
            )
        # The report's own pictures, and none that an earlier one left.
        shown = {f"{evaluation.name}/{file}": evaluation / file for _, file, _ in report.pictures}
        pictures |= {name: file for name, file in shown.items() if name in PICTURES}
        Provenance.read(jem.provenance)  # a file has it, in which results may be anything
        measured = report.card_results()
        kinds = {result["type"] for result in measured}
        own = jem.provenance.get("results") if jem.provenance.get("results_of") == report.subject["weights"] else None
        kept = [result for result in own or [] if result["type"] not in kinds]
        jem.provenance = {**jem.provenance, "results": kept + measured, "results_of": report.subject["weights"]}
    url = jem.push_to_hub(
        settings.repo_id,
        commit_message=f"Push {run.path.name} using timm_jem",
        private=settings.private,
        replay_buffer=settings.replay_buffer,
        pictures=pictures,
        overwrite_card=settings.overwrite_card,
    )
    print(f"pushed to {url}")


if __name__ == "__main__":
    with one_line_errors(stopped="interrupted; the same command goes on", less="give it more"):
        main(sys.argv[1:])
