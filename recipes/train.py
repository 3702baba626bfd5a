"""Train a joint energy model: cross-entropy plus maximum likelihood of x by SGLD (JEM, arXiv 1912.03263).

    accelerate launch recipes/train.py                                     # handwritten digits, nothing to download
    accelerate launch recipes/train.py --data.dataset cifar10 --model.name wrn_28_10
    accelerate launch recipes/train.py --config cifar10_jem --output_dir runs/a
    accelerate launch recipes/train.py --resume runs/a                     # go on from the newest checkpoint

Without a data set and a config, recipes/configs/digits.yaml is used; otherwise the defaults are the paper's.
"""

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_jem import InputError
from timm_jem.data import Splits, load_splits
from timm_jem.data.identity import data_identity
from timm_jem.data.images import check_others
from timm_jem.hub.repository import make_repository
from timm_jem.shell import one_line_errors
from timm_jem.training import (
    Batches,
    Checkpoints,
    DivergenceGuard,
    Learner,
    Rollback,
    Run,
    Settings,
    check_plan,
    open_accelerator,
    parse_settings,
    settings_of,
)
from timm_jem.training.build import build_learner, build_stream, keep_source, workers_of
from timm_jem.training.cadence import Cadence, stop_signals
from timm_jem.training.classifier import AS_TOLD, as_told, classifier_settings
from timm_jem.training.finish import finish
from timm_jem.training.measure import measure
from timm_jem.training.processes import is_sharded
from timm_jem.training.publish import publishable, push
from timm_jem.training.record import Record
from timm_jem.training.resume import differences, refuse_changes, what_terms_are_of
from timm_jem.training.run import Unread
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.start import start_lines

DIGITS_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


def main(argv: list[str]) -> None:
    told, command = parse_settings(argv, DIGITS_CONFIG)
    auto = told.train.mixed_precision == "auto"
    accelerator = open_accelerator(told.train)

    # Everything that can be wrong with the input is found before anything is written.
    folder = RunFolder.choose(told.output_dir, told.data.dataset, told.resume)
    (folder,) = broadcast_object_list([folder])
    splits = load_splits(told.data)
    settings = planned(told, splits, accelerator)
    if settings.resume and (steps := folder.finished(settings.train.steps)) is not None:
        if folder.config_file.is_file():
            own = settings_of(folder).sections()
            refuse_changes(own, settings)
            for line in differences(own, settings.sections()):
                accelerator.print(f"note: {line}, and does nothing any more")
        accelerator.print(f"{folder} is finished: {steps} steps, see {folder.summary_file}")
        accelerator.end_training()
        return
    goes_on = settings.resume is not None and has_checkpoint(folder, accelerator)
    kept = folder.backbone if goes_on else None
    if not goes_on and folder.classifier.path.is_dir():
        if not settings.trains_classifier:
            raise InputError(
                f"{folder} starts from its classifier, and now classifier.steps is 0, or the weights are others: leave these "
                "out, or start another run"
            )
        kept = folder.classifier.backbone
    built = build(settings, splits, accelerator, kept=kept)
    accelerator = built[0].accelerator
    if auto:  # what repeats the run doesn't measure again
        command += ["--train.mixed_precision", settings.train.mixed_precision]
    first = None if goes_on else classifier_settings(settings)
    if first is not None:
        plan = planned(replace(first, resume="auto"), splits, accelerator)
        if folder.config_file.is_file() and folder.classifier.finished(plan.train.steps) is not None:
            refuse_changes(settings_of(folder).sections(), settings, section="classifier")
        built = None  # its memory is the classifier's meanwhile
        try:
            built = build(plan, splits, accelerator, kept=folder.classifier.backbone)
        except InputError as error:
            raise InputError(as_told(str(error))) from error
    if accelerator.is_main_process and not settings.data.skip_broken:  # with it all have been tried
        check_others([splits.val, splits.test])  # they are met when hours of training are done
    if settings.hub.push_to is not None and accelerator.is_main_process:
        make_repository(settings.hub.push_to, private=settings.hub.private)
    with folder.claimed(accelerator):
        record = Record(folder, accelerator, settings, command, data_identity(splits))
        if first is not None:
            train_classifier(first, plan, splits, built, record)
            built = None  # before the next
            before = folder.classifier
            built = build(settings, splits, accelerator, kept=before.backbone, classifier=before.model)
        perform(told, settings, splits, built, record, goes_on=goes_on)
        accelerator.end_training()


def has_checkpoint(folder: RunFolder, accelerator: Accelerator) -> bool:
    return folder.checkpoint is not None or Checkpoints(folder.checkpoints, accelerator).newest()[0] is not None


def planned(told: Settings, splits: Splits, accelerator: Accelerator) -> Settings:
    return check_plan(told, splits, accelerator.num_processes, sharded=is_sharded(accelerator))


def build(settings: Settings, splits: Splits, accelerator: Accelerator, **source: Path | None) -> tuple[Learner, Batches]:
    accelerator.free_memory()  # what it prepared before
    learner = build_learner(settings, splits, accelerator, **source)
    return learner, build_stream(settings, splits, learner)


def train_classifier(told: Settings, settings: Settings, splits: Splits, built: tuple[Learner, Batches], joint: Record) -> None:
    """Cross-entropy alone, a run of its own inside of the joint one's folder; what is done of it is not done again."""
    folder, accelerator = joint.folder.classifier, joint.accelerator
    goes_on = has_checkpoint(folder, accelerator)
    if not joint.folder.config_file.is_file():  # without it, a folder that holds another is none of a run
        joint.write_settings()
    with folder.claimed(accelerator):
        record = Record(folder, accelerator, settings, joint.command, joint.data, AS_TOLD)
        perform(told, settings, splits, built, record, goes_on=goes_on, joint=joint)
        joint.command = record.command  # with what the run was told before it was stopped
        accelerator.wait_for_everyone()  # the main process is saving what all start from


def perform(
    told: Settings,
    settings: Settings,
    splits: Splits,
    built: tuple[Learner, Batches],
    record: Record,
    *,
    goes_on: bool,
    joint: Record | None = None,
) -> None:
    """A run, from its newest checkpoint or its beginning to its end; ``joint`` is that of the run it is the first part of."""
    learner, stream = built
    folder, accelerator, of = record.folder, record.accelerator, what_terms_are_of(settings)
    run = Run(
        learner,
        stream,
        DivergenceGuard(settings.guard, accelerator, len(splits.class_names), learner.method.watched, of=of),
        Checkpoints(folder.checkpoints, accelerator, keep=settings.train.keep_checkpoints),
        grad_accum=settings.train.grad_accum,
        seed=settings.train.seed,
    )
    if settings.resume and resume(settings.resume, run, record):
        return stream.close()
    if not goes_on and accelerator.is_main_process:
        keep_source(settings, learner.jem, folder.backbone)
    if joint is not None:
        joint.write_settings()  # by which both go on
    record.open(run.step)
    with closing(record):  # an error is said below the progress bar, not above it
        record.say(start_lines(told, settings, splits, run, folder))
        if not goes_on and (settings.model.starts_pretrained or folder.classifier.model.is_dir()):
            measure_start(settings, splits, run, record)
        broke = train(settings, splits, run, record)
        finish(settings, splits, run, record, broke)


def resume(asked: str, run: Run, record: Record) -> bool:
    """Go on from the newest whole checkpoint, or the one that was asked for; whether all is done, and the model there.

    Without any, "auto" starts at the beginning; so does joint training where the classifier before it has been trained.
    """
    folder = record.folder
    starts = asked == "auto" or folder.classifier.model.is_dir()
    done = folder.finished(record.settings.train.steps) is not None and folder.model.is_dir()
    saved = run.resume(folder.checkpoint, record.load_state_dict)
    if saved is None and not done and (not starts or folder.summary_file.is_file()):
        raise InputError(f"{folder} has no complete checkpoint to resume from: start again in another output_dir")
    return done


def measure_start(settings: Settings, splits: Splits, run: Run, record: Record) -> None:
    """What pretrained weights are worth before the first step; a new head knows nothing yet."""
    with record.not_training():
        jem, accelerator = run.learner.published(), run.learner.accelerator
        figures = measure(jem, splits.val, "val", accelerator, workers=workers_of(settings.train))
        record.log(run.step, figures)
        record.say(f"validation accuracy before the first step: {figures['val_accuracy']:.4f}")


def train(settings: Settings, splits: Splits, run: Run, record: Record) -> Rollback | None:
    """Optimiser steps until all are done, or the run gives up: then the rollback that was one too many is returned.

    A signal saves, and ends the process; so do images that can't be read.
    """
    learner, accelerator = run.learner, run.learner.accelerator
    cadence = Cadence(settings, accelerator)
    if not run.guard.snapshots:
        run.snapshot()
    with stop_signals() as signals:
        while run.step < settings.train.steps:
            lr = max(group["lr"] for group in learner.optimizer.param_groups)  # with layer decay the last layers'
            try:
                terms = run.advance()
            except Unread as error:
                raise InputError(f"{error}{kept(run, record)}") from error
            record.advanced()
            due = cadence.at(run.step, signals)
            if not due:
                continue
            broke = run.judge(whole=due.look)
            if broke is not None:  # nothing is logged, kept or shown of training that broke
                record.rollback(broke)
                if broke.remedy is None:
                    return broke
                continue
            if due.log:
                record.log(run.step, terms, lr=lr)
            with record.not_training():
                if due.sample and (accelerator.is_main_process or is_sharded(accelerator)):
                    record.samples(run.step, learner.published(), record.folder.samples(run.step).name)
                    record.chains(run.step, learner.method.buffer)
                if due.validate:
                    validate(settings, splits, run, record)
                if due.push:
                    publish(settings, splits, run, record)
            if due.checkpoint or due.snapshot:
                run.snapshot(alone=due.checkpoint)  # as a run that goes on from a checkpoint, which has no other
            if due.checkpoint or due.stop:
                save(run, record, needed=bool(due.stop), interim=not due.checkpoint)
            if due.stop:
                record.close()
                accelerator.print(f"{due.stop.name}: stopped at step {run.step}; go on with --resume {record.folder.whole}")
                accelerator.end_training()
                sys.exit(128 + due.stop)
    return None


def kept(run: Run, record: Record) -> str:
    """Write a checkpoint of a run that can't read on, and say so; of several processes the others are a step further."""
    if run.step == 0 or run.learner.accelerator.num_processes > 1:
        return ""
    save(run, record, needed=True, interim=True)
    return f"; stopped at step {run.step}, go on with --resume {record.folder.whole}"


def validate(settings: Settings, splits: Splits, run: Run, record: Record) -> None:
    """Accuracy and calibration on validation images; the best models are kept."""
    accelerator, workers = run.learner.accelerator, workers_of(settings.train)
    figures = measure(run.learner.published(), splits.val, "val", accelerator, workers=workers)
    record.log(run.step, figures)
    if settings.train.best_k:
        record.keep_best(run.step, figures["val_accuracy"], lambda: publishable(settings, splits, run, record))


def publish(settings: Settings, splits: Splits, run: Run, record: Record) -> None:
    """Push what there is, with the pictures of this step; training goes on where the Hub says no."""
    jem = publishable(settings, splits, run, record, chains=True)
    if run.learner.accelerator.is_main_process:
        # samples.png is of an earlier end of the run, where there is one.
        pictures = {**record.folder.pictures(), "samples.png": record.folder.samples(run.step)}
        try:
            push(jem, settings, record, f"Step {run.step}", pictures)
        except InputError as error:
            record.say(f"step {run.step} was not pushed, training goes on: {error}")


def save(run: Run, record: Record, *, needed: bool, interim: bool) -> None:
    """Write a checkpoint. Where it is the last word of a stopped run, one that can't be written is an error."""
    last = run.step == record.settings.train.steps
    tries = record.patiently if needed or last else (lambda write: write())
    try:
        tries(lambda: run.save(record.state_dict(), interim=interim))
    except InputError as error:
        if needed:
            run.save(record.state_dict(), snapshots=False, interim=interim)  # which takes less
        else:
            record.say(f"{error}{'' if last else '; training goes on'}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
