"""Everything that can be set of a training run."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import yaml
from accelerate.tracking import get_available_trackers

from timm_jem.command_line import Arguments
from timm_jem.data import DataConfig
from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.evaluation.attacks import PGDConfig
from timm_jem.hub.reading import model_folder
from timm_jem.models.names import check_name
from timm_jem.objectives import ObjectiveConfig
from timm_jem.sampling import MOST_STEPS, SGLDConfig
from timm_jem.training.guard import GuardConfig

__all__ = ["OF_WEIGHTS", "ClassifierConfig", "HubConfig", "ModelConfig", "Settings", "TrainConfig"]

OF_WEIGHTS = ("pretrained_cfg", "pretrained_cfg_overlay")  # arguments of timm.create_model that may name a file of weights


@dataclass
class ModelConfig:
    """The backbone.

    Attributes:
        name: any timm name, or one of this package's wrn_*; a folder with a saved model or a run, or timm's "local-dir:" and
            "hf-hub:".
        pretrained: start from pretrained weights; None: for folders and the Hub, whose names mean a model that is trained.
        drop_rate: timm's dropout, for the loss only: chains move without.
        drop_path_rate: timm's stochastic depth, likewise.
        kwargs: more arguments for timm.create_model, e.g. {act_layer: silu}. Those of a config are for its own model:
            a model's name after it, of a flag or another config, drops them, whatever other arguments come with it.
    """

    name: str = "wrn_28_10"
    pretrained: bool | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    kwargs: Arguments = field(default_factory=dict)

    @property
    def has_source(self) -> bool:
        """Whether the name is that of a folder or a Hub repository."""
        return ":" in self.name

    @property
    def starts_pretrained(self) -> bool:
        """Whether a new run starts from weights that are trained already."""
        return self.has_source if self.pretrained is None else self.pretrained


@dataclass
class TrainConfig:
    """The training loop. Defaults are JEM's for CIFAR-10: 150 epochs, Adam, 1e-4, warm-up, ×0.3 at the end.

    Attributes:
        steps: optimiser steps; 117,000 are 150 epochs of CIFAR-10.
        epochs: instead of steps: passes over the training images.
        batch_size: images, and chains, of a process in one forward; an optimiser step takes grad_accum of them.
        grad_accum: batches whose mean gradient makes one optimiser step.
        ce_batch_size: batches of their own for the cross-entropy, of so many images; None: the same images (SADA-JEM:
            64 for p(x), 128 for the cross-entropy).
        px_augment: how images for p(x) are augmented: full (JEM: as for the cross-entropy), flip, or none (SADA-JEM).
        ce_auto_augment: a policy of timm for the images of the cross-entropy, e.g. rand-m9-mstd0.5 or augmix-m3-w3; they
            then come in batches of their own.
        opt: a timm optimiser.
        lr: its learning rate.
        weight_decay: of the optimiser.
        opt_kwargs: its other arguments, as timm.optim.create_optimizer_v2 takes them; {layer_decay: 0.75} gives each layer
            that much of the learning rate of the one above it, the head all of it.
        freeze: parts of the backbone that stay as they are, BatchNorm statistics included: names of its modules, and stem.
        warmup_steps: optimiser steps in which the learning rate rises to lr; None: JEM's 1000, or a tenth of a run that is
            shorter than ten times that.
        sched: a timm schedule over all steps after warmup_steps; step decays after each third of them, wsd and rsqrt over the
            last fifth of what follows the warm-up.
        milestones: where a multistep schedule decays, as parts of all steps, in any order.
        decay_rate: the factor of a decay; of sched poly its power.
        sched_kwargs: more for timm.scheduler.create_scheduler_v2, in steps where it says epochs.
        grad_clip: bound of the gradient's norm; 0: none.
        sam_rho: of sharpness-aware minimisation, ρ (SADA-JEM: 2): each step takes a second gradient, from where the loss is
            worst nearby; 0: none.
        sam_adaptive: near in units of the weights themselves (ASAM, SADA-JEM), instead of one length for all.
        ema_decay: of timm's moving average of the weights, which then is what is evaluated, drawn from and kept; 0: none.
        data_noise: standard deviation of noise on the images while training, pixels. Chains can't be narrower than
            their own noise, so keep it above sgld.noise_std, or the energy sharpens without end.
        ce_noise: that of the images for the cross-entropy, or None: as data_noise.
        attack_norm: linf or l2: the cross-entropy is of images attacked by projected gradient descent (Madry et al.; DAT: l2);
            None: not attacked.
        attack_eps: how far they are moved at most, in pixels in [0, 1], as attacks have it: a number, or a fraction such as
            4/255; None: 8/255 for linf, 0.5 for l2 (those of CIFAR-10, as in Madry et al. and DAT).
        attack_steps: steps of the attack, each as expensive as one of a chain.
        attack_step_size: of each; None: 2.5 · attack_eps / attack_steps.
        buffer_size: chains in the replay buffer of a process; None: JEM's 10,000, or as many as take 1 GiB; in any
            case as many of each class as a batch may need.
        restart_prob: how likely a chain that is drawn from it starts anew.
        restart_least: where given, each slot has a likelihood of its own, evenly on a logarithmic scale from this to
            restart_prob, so that there are chains of every age, and long ones stay good when the model draws.
        init: where chains start, in training and when the model draws: uniform noise (JEM), or gaussian: fitted to the
            images of each class (JEM++, SADA-JEM), and saved with the model; leave it at noise with data.starts.
        conditional_chains: chains of p(y) p(x|y) as negatives of E(x) as well; with objective w_xy they are anyway.
        ramp_from: sgld.num_steps of the first optimiser step, where ramp_steps is not 0.
        ramp_steps: optimiser steps in which sgld.num_steps is reached from there; 0: at once.
        ramp_auc: instead, sgld.num_steps grows by one from ramp_from on whenever images and chains are told apart by their
            energies with this AUROC (DAT: 0.8); None: by ramp_steps.
        step_cosine: sgld.step_size adapts, so that the gradients of a step and of the next one have this cosine on average, and
            is that of the model in the end; 0 would be as far as the energy falls along the gradient. None: it stays.
        batch_norm: BatchNorm while chains move: eval (running statistics), frozen (in the loss, too), or train (JEM++,
            SADA-JEM: batch statistics; what is sampled then is not the density that is scored).
        balance: the energy terms of the objective are multiplied by how much longer the gradient of the cross-entropy is than
            theirs, at each step anew, so that their weights are those of gradients: w_x 1 and w_ce 1 pull alike at the network.
            It costs two backward passes.
        objective: weights of the loss; w_xy > 0 gives class-conditional chains.
        seed: of weights, order and chains.
        mixed_precision: no, bf16, or auto: the one of them that is faster with this network here, which is measured when the
            run starts and stays with it; None: as accelerate launch says.
        channels_last: memory layout of convolutions.
        compile: torch.compile's mode for the backbone: default, reduce-overhead or max-autotune; None: not compiled.
        capture: where one process trains on one GPU, launch the passes of a chain's step as one CUDA graph; not with compile
            reduce-overhead or max-autotune, which do so by themselves.
        threads: CPU threads of a process; None: this machine's cores divided among its processes, where
            ``accelerate launch`` by itself gives one.
        workers: processes that decode images, for data sets not kept in memory; None: as the machine's cores allow.
        log_every: optimiser steps between lines of metrics.jsonl.
        sample_every: optimiser steps between pictures; 0: only at the end.
        eval_every: optimiser steps between validations; 0: only at the end.
        checkpoint_every: optimiser steps between checkpoints for --resume; 0: only when the last step is done, or when stopped
            by SIGTERM or SIGINT.
        keep_checkpoints: how many.
        best_k: keep the models of the k best validation accuracies in best/, that of the end included.
        trackers: tensorboard, trackio or wandb.
        sample_steps: lengths tried on validation images for fresh chains, in multiples of sgld.num_steps, where
            sgld.sample_steps doesn't tell.
        sample_count: how many chains for that.
    """

    steps: int = 117_000
    epochs: float | None = None
    batch_size: int = 64
    grad_accum: int = 1
    ce_batch_size: int | None = None
    px_augment: Literal["full", "flip", "none"] = "full"
    ce_auto_augment: str | None = None
    opt: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    opt_kwargs: Arguments = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = "multistep"
    warmup_steps: int | None = None
    milestones: list[float] = field(default_factory=lambda: [0.8, 0.9])
    decay_rate: float = 0.3
    sched_kwargs: Arguments = field(default_factory=dict)
    grad_clip: float = 0.0
    sam_rho: float = 0.0
    sam_adaptive: bool = True
    ema_decay: float = 0.0
    data_noise: float = 0.03
    ce_noise: float | None = None
    attack_norm: Literal["linf", "l2"] | None = None
    attack_eps: float | None = None
    attack_steps: int = 10
    attack_step_size: float | None = None
    buffer_size: int | None = None
    restart_prob: float = 0.05
    restart_least: float | None = None
    init: Literal["noise", "gaussian"] = "noise"
    conditional_chains: bool = False
    ramp_from: int = 1
    ramp_steps: int = 0
    ramp_auc: float | None = None
    step_cosine: float | None = None
    batch_norm: Literal["eval", "frozen", "train"] = "eval"
    balance: bool = False
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    seed: int = 0
    mixed_precision: str | None = None
    channels_last: bool = True
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    capture: bool = True
    threads: int | None = None
    workers: int | None = None
    log_every: int = 50
    sample_every: int = 5000
    eval_every: int = 5000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    best_k: int = 0
    trackers: list[str] = field(default_factory=list)
    sample_steps: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 7, 10, 15, 20])
    sample_count: int = 500

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "grad_accum": 1, "log_every": 1, "sample_count": 2}
        least |= {"sample_every": 0, "eval_every": 0, "ramp_from": 1, "ramp_steps": 0}
        least |= {"checkpoint_every": 0, "keep_checkpoints": 1, "best_k": 0}
        optional = {"threads": 1, "ce_batch_size": 1, "buffer_size": 1, "warmup_steps": 0, "workers": 0}
        least |= {name: value for name, value in optional.items() if getattr(self, name) is not None}
        for name, value in least.items():
            check_whole(f"train {name}", getattr(self, name), value)
        check_whole("train seed", self.seed, 0, most=2**31 - 1)  # NumPy's, and processes count up from it
        check_number("train lr", self.lr, above=0)
        for name in ("weight_decay", "grad_clip", "sam_rho", "data_noise", "decay_rate"):
            check_number(f"train {name}", getattr(self, name), least=0)
        if self.ce_noise is not None:
            check_number("train ce_noise", self.ce_noise, least=0)
        if self.epochs is not None:
            check_number("train epochs", self.epochs, above=0)
        check_number("train ema_decay", self.ema_decay, least=0, most=1)
        if self.ramp_auc is not None:
            check_number("train ramp_auc", self.ramp_auc, least=0, most=1)
        if self.step_cosine is not None:
            check_number("train step_cosine", self.step_cosine, least=-0.9, most=0.9)
        self.attack()  # which refuses what it can't be
        for milestone in self.milestones:
            check_number("train milestones", milestone, least=0, most=1)
        if not self.sample_steps or min(self.sample_steps) < 1:
            raise InputError("train sample_steps must be a list of whole numbers of at least 1")
        if self.mixed_precision not in (None, "no", "bf16", "auto"):
            raise InputError(
                f"train mixed_precision is {quoted(self.mixed_precision)}: give bf16, no or auto (the gradient scaler of fp16 "
                "does not cover the chains' gradients, which underflow)"
            )
        for name in self.trackers:
            if name not in ("tensorboard", "trackio", "wandb"):
                raise InputError(f"train trackers has {quoted(name)}: choose from tensorboard, trackio and wandb")
            if name not in {str(tracker) for tracker in get_available_trackers()}:
                raise InputError(f"train trackers has {quoted(name)}, which is not installed: pip install {name}")

    def attack(self) -> PGDConfig | None:
        """The attack on the images of the cross-entropy."""
        if self.attack_norm is None:
            return None
        usual = 8 / 255 if self.attack_norm == "linf" else 0.5
        return PGDConfig(
            self.attack_norm, usual if self.attack_eps is None else self.attack_eps, self.attack_steps, self.attack_step_size
        )

    @property
    def needs_classes(self) -> bool:
        """Whether chains are those of E(x, y)."""
        return self.objective.w_xy > 0 or self.conditional_chains


@dataclass
class ClassifierConfig:
    """Cross-entropy alone, before joint training: energies then start from a network that knows the classes.

    It is a run of its own in ``classifier/`` inside of the run's folder, with BatchNorm's statistics alive, that joint training
    starts from when it is done. Weights that are trained already need none. Its images are attacked where those of joint
    training's cross-entropy are.

    Attributes:
        steps: optimiser steps; 0: none, joint training starts at once.
        epochs: instead of steps: passes over the training images.
        batch_size: images of a process in a step.
        opt: a timm optimiser.
        lr: its learning rate, which falls by half a cosine.
        weight_decay: of the optimiser.
        opt_kwargs: its other arguments.
        ema_decay: of the moving average of the weights that joint training starts from; 0: none.
        noise: standard deviation of noise on the images, pixels.
    """

    steps: int = 0
    epochs: float | None = None
    batch_size: int = 128
    opt: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    opt_kwargs: Arguments = field(default_factory=dict)
    ema_decay: float = 0.995
    noise: float = 0.03

    def __post_init__(self) -> None:
        check_whole("classifier steps", self.steps, 0)
        check_whole("classifier batch_size", self.batch_size, 1)
        check_number("classifier lr", self.lr, above=0)
        if self.epochs is not None:
            check_number("classifier epochs", self.epochs, above=0)
        for name in ("weight_decay", "noise"):
            check_number(f"classifier {name}", getattr(self, name), least=0)
        check_number("classifier ema_decay", self.ema_decay, least=0, most=1)


@dataclass
class HubConfig:
    """Publishing. ``hf auth login`` first; recipes/push.py publishes a run already done.

    Attributes:
        push_to: repository "user/name" to push the model, its card, pictures and chains to; None: none.
        private: make it private, or public, if it isn't there yet; None: as new ones of its owner are.
        every: push what there is every so many optimiser steps as well; 0: only at the end.
        replay_buffer: publish the chains, at 8 bits, as many as fit 64 MiB.
    """

    push_to: str | None = None
    private: bool | None = None
    every: int = 0
    replay_buffer: bool = True

    def __post_init__(self) -> None:
        check_whole("hub every", self.every, 0)


@dataclass
class Settings:
    """A training run: what ``recipes/train.py`` takes.

    Attributes:
        data, model, classifier, sgld, train, guard, hub: see their classes.
        output_dir: the run's folder; None: runs/<data set>, numbered.
        resume: a run's folder or one of its checkpoints: go on with it; "auto": go on with ``output_dir`` where it has a
            checkpoint, else start it; None: a new run.

    Raises:
        InputError: settings that don't go together.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    sgld: SGLDConfig = field(default_factory=SGLDConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    output_dir: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        self.model = replace(self.model, name=_named(self.model.name), kwargs=_from_anywhere(self.model.kwargs))
        reserved = {"num_classes", "input_size", "class_names", "sgld", "drop_rate", "drop_path_rate"}
        if taken := reserved & set(self.model.kwargs):
            raise InputError(f"model.kwargs has {', '.join(sorted(taken))}, which other settings or data give: leave it out")
        if "checkpoint_path" in self.model.kwargs:
            raise InputError(
                "model.kwargs has checkpoint_path, whose head must fit the data: give --model.pretrained true --model.kwargs "
                "'{pretrained_cfg_overlay: {file: PATH}}', which takes any head"
            )
        if not (self.train.objective.w_ce or self.train.objective.needs_chains):
            raise InputError("train.objective w_ce, w_x and w_xy are all 0, and nothing would be learnt: raise one")
        if self.train.attack_norm is not None and not self.train.objective.w_ce:
            raise InputError(
                "train.attack_norm attacks the images of the cross-entropy, and train.objective w_ce is 0: raise it, or leave "
                "the attack out"
            )
        if self.train.balance and not self.train.objective.w_ce:
            raise InputError(
                "train.balance measures the energy terms by the cross-entropy, and train.objective w_ce is 0: raise it, or "
                "leave the balance out"
            )
        if self.train.ramp_auc is not None and self.train.ramp_steps:
            raise InputError("train.ramp_auc and train.ramp_steps both say when chains get longer: give one of them")
        if self.train.objective.needs_chains and self.train.step_cosine is not None and self.sgld.num_steps == 1:
            raise InputError("train.step_cosine compares the gradients of two steps, and sgld.num_steps is 1: raise it")
        if not self.lengths():
            raise InputError(
                f"no train.sample_steps is longer than sgld.denoise_steps {self.sgld.denoise_steps}: give longer ones"
            )
        longest = max(self.train.sample_steps) * self.sgld.num_steps
        if self.sgld.sample_steps is None and longest > MOST_STEPS:
            raise InputError(
                f"train.sample_steps and sgld.num_steps {self.sgld.num_steps} make chains of {longest:,} steps: give at most "
                f"{MOST_STEPS:,}"
            )
        if self.data.streaming and (self.train.epochs is not None or self.classifier.epochs is not None):
            raise InputError("epochs need to know how many images there are, and data.streaming doesn't: give steps")
        if self.data.starts is not None and self.train.init != "noise":
            raise InputError(
                f"data.starts and train.init {self.train.init} both say where chains start: set train.init noise, or leave the "
                "first out"
            )
        if self.data.streaming and self.train.init == "gaussian":
            raise InputError("train.init gaussian is fitted to images at hand, and data.streaming has none: use noise")

    @property
    def trains_classifier(self) -> bool:
        """Whether a classifier comes first."""
        return not self.model.starts_pretrained and bool(self.classifier.steps or self.classifier.epochs)

    def lengths(self, num_steps: int | None = None) -> list[int]:
        """The lengths of fresh chains to try: ``train.sample_steps`` times K, which is ``num_steps`` or ``sgld.num_steps``."""
        lengths = [min(n * (num_steps or self.sgld.num_steps), MOST_STEPS) for n in self.train.sample_steps]
        return [length for length in lengths if length > self.sgld.denoise_steps]

    def sections(self) -> dict[str, dict[str, Any]]:
        """What a model and its card tell of the settings, as JSON data."""
        return {name: asdict(getattr(self, name)) for name in ("data", "model", "classifier", "sgld", "train", "guard")}

    def as_yaml(self) -> str:
        """A file for ``--config`` that repeats the run, in a folder of its own and without publishing it."""
        sections = {**self.sections(), "hub": {**asdict(self.hub), "push_to": None}}
        told = {name: {key: value for key, value in section.items() if value is not None} for name, section in sections.items()}
        return yaml.safe_dump(told, sort_keys=False)


def _from_anywhere(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model whose file of weights, where there is one, is told from the root."""
    found = dict(kwargs)
    for key in OF_WEIGHTS:
        if isinstance(kwargs.get(key), dict) and isinstance(file := kwargs[key].get("file"), str):
            found[key] = {**kwargs[key], "file": os.path.abspath(os.path.expanduser(file))}
    return found


def _named(name: str) -> str:
    """A backbone's name as timm takes it: a folder that is no name of a model's is "local-dir:", a run's folder its model."""
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if name.startswith("local-dir:") or (":" not in name and folder.is_dir() and not timm.is_model(name)):
        return f"local-dir:{model_folder(folder).absolute()}"
    if "/" in name and ":" not in name:
        remedy = "give one with a saved model" if name[0] in "./~" else f"a Hub repository is hf-hub:{name}"
        raise InputError(f"model.name is {name!r}, and there is no such folder: {remedy}")
    check_name(name)
    return name
