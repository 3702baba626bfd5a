"""The end of a run: figures, the length of fresh chains, pictures, the model on disk and on the Hub."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from timm_jem.data import Splits
from timm_jem.data.sources import public_name
from timm_jem.errors import InputError, program
from timm_jem.evaluation import best_num_steps
from timm_jem.model import JEM
from timm_jem.pixels import to_pixels
from timm_jem.training.build import workers_of
from timm_jem.training.measure import in_batches, measure
from timm_jem.training.publish import of_classifier, publishable, push
from timm_jem.training.record import Record
from timm_jem.training.run import Rollback, Run
from timm_jem.training.settings import Settings

__all__ = ["finish"]


def finish(settings: Settings, splits: Splits, run: Run, record: Record, broke: Rollback | None = None) -> None:
    """Measure, save, draw and publish the model of a run; all processes call it.

    How long fresh chains should be is chosen on validation images; test images are only reported on. The model is
    on disk before any chain is drawn; summary.json comes last, and says that the run is done.

    Args:
        settings, splits, run, record: the run.
        broke: what ended it early, after the last remedy.

    Raises:
        InputError: the run gave up, its last good model is saved, and this says where; or the Hub refuses the model.
    """
    accelerator, folder = run.learner.accelerator, record.folder
    record.close()
    run.stream.close()
    rate = "train.lr" if folder.part_of is None else "classifier.lr"
    workers, explanation = workers_of(settings.train), None if broke is None else _explanation(broke, run, settings, rate)
    jem = run.learner.published().eval()
    figures = {
        **measure(jem, splits.val, "val", accelerator, workers=workers),
        **measure(jem, splits.test, "test", accelerator, workers=workers),
    }
    summary = {
        "outcome": "finished" if broke is None else "stopped",
        "explanation": explanation,
        **figures,
        "steps": run.step,
        "seconds": record.seconds,
        "seconds_per_step": record.seconds / max(run.step, 1),
        "rollbacks": run.rollbacks,
        **of_classifier(folder),
        "best": [{"val_accuracy": value, "model": f"best/step_{int(step):08d}"} for value, step in record.best],
    }
    jem = publishable(
        settings,
        splits,
        run,
        record,
        chains=True,
        results=_results(settings, splits, summary),
        outcome=summary["outcome"],
        explanation=explanation,
    ).eval()
    if not accelerator.is_main_process:
        return
    jem.fit_reference((jem.normalize(to_pixels(images)), y) for images, y in in_batches(splits.val, workers))
    jem.sgld = replace(jem.sgld, rest=settings.sgld.rest)
    _keep(run, record, lambda: jem.save_pretrained(folder.model))  # sampling may fail where training did not: for memory, say
    if settings.train.objective.needs_chains:
        summary |= _choose_length(settings, splits, jem)
        record.samples(run.step, jem, "samples.png")
        record.chains(run.step, run.learner.method.buffer)
        _keep(run, record, lambda: jem.save_pretrained(folder.model))
    _keep(run, record, lambda: folder.write_json(folder.summary_file, summary))
    print(_last_line(settings, record, summary))
    if broke is not None:
        raise InputError(f"training {explanation}; the last good model, of step {run.step}, is in {folder.model}")
    if settings.hub.push_to is not None:
        try:
            model = settings.model.name.rsplit("/", 1)[-1]  # a folder's path is for nobody else
            message = f"{model} after {run.step} steps on {public_name(settings.data.dataset)}"
            push(jem, settings, record, message, folder.pictures())
        except InputError as error:
            raise InputError(f"{error}; the run is whole: {program('push')} {folder} {settings.hub.push_to}") from error


def _keep(run: Run, record: Record, write: Callable[[], Any]) -> None:
    """Write what the run was for; where it can't be, say what there is instead."""
    try:
        record.patiently(write)
    except InputError as error:
        steps = run.checkpoints.steps()
        goes_on = f"go on with --resume {record.folder.whole}"
        rest = f"the checkpoint of step {steps[-1]} is whole: {goes_on}" if steps else "nothing is saved"
        raise InputError(f"{error}; {rest}") from error


def _last_line(settings: Settings, record: Record, summary: dict[str, Any]) -> str:
    folder, rolled_back = record.folder, len(summary["rollbacks"])
    if settings.train.objective.needs_chains:
        then = f"look at {folder.path / 'samples.png'}"
    elif folder.part_of is not None:
        then = "its energies come next" if summary["outcome"] == "finished" else "no energies follow"
    else:
        then = f"p(x) was not trained: --model.name {folder.path} starts a run that trains it"
    if settings.train.objective.needs_chains and settings.data.starts is not None:
        then = (
            f"chains started at images of {public_name(settings.data.starts)}, which are not published: the model draws from "
            f"their Gaussian; {then}"
        )
    before = summary.get("classifier", {}).get("test_accuracy")
    return (
        f"test accuracy {summary['test_accuracy']:.4f}{'' if before is None else f' (the classifier before: {before:.4f})'}, "
        f"ECE {summary['test_ece']:.4f}, {record.seconds:.0f} s of training"
        f"{f', rolled back {rolled_back} time' + 's' * (rolled_back > 1) if rolled_back else ''}; {then}"
    )


def _explanation(broke: Rollback, run: Run, settings: Settings, rate: str = "train.lr") -> str:
    times = f"{len(run.rollbacks)} rollback{'s' * (len(run.rollbacks) != 1)}"
    advice = f"lower {rate}, or take a smooth activation"
    if settings.train.objective.needs_chains:
        chains = "sgld.noise_std" if settings.train.step_cosine is not None else "sgld.step_size or sgld.noise_std"
        advice = f"lower train.lr, {chains}, raise train.objective.energy_l2 or sgld.num_steps, or take a smooth activation"
    return f"gave up after {times} at step {broke.step}: {broke.reason}; {advice}"


def _choose_length(settings: Settings, splits: Splits, jem: JEM) -> dict[str, Any]:
    """Set the length of fresh chains to the best on validation images, unless it was told; what the summary says of it."""
    train = settings.train
    if settings.sgld.sample_steps is not None:
        return {"sample_steps": settings.sgld.sample_steps}
    jem.sgld = replace(jem.sgld, sample_steps=None)
    best_length, distances = best_num_steps(
        jem,
        (to_pixels(images) for images, _ in in_batches(splits.val, workers_of(train))),
        torch.arange(train.sample_count) % jem.num_classes,
        settings.lengths(jem.sgld.num_steps) or [jem.sgld.denoise_steps + 1],  # chains that have not grown yet
        generator=torch.Generator(jem.device).manual_seed(train.seed),
        batch_size=train.batch_size,
    )
    jem.sgld = replace(jem.sgld, sample_steps=best_length)
    return {"sample_steps": best_length, "val_frechet_by_steps": distances}


def _results(settings: Settings, splits: Splits, summary: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = (("Accuracy", "accuracy", "top-1"), ("Expected calibration error", "ece", "15 equal bins, L1"))
    before = summary.get("classifier", {}).get("steps")
    steps = f"{summary['steps']} steps{'' if before is None else f' after {before} of cross-entropy alone'}"
    return [
        {
            "name": name,
            "type": kind,
            "value": summary[f"test_{kind}"],
            "split": splits.tested_on,
            "n": len(splits.test),
            "protocol": f"{protocol}; seed {settings.train.seed}, {steps}, one run",
        }
        for name, kind, protocol in kinds
    ]
