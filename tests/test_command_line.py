"""What people type, and write into YAML files, on its way to settings."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from timm_jem import InputError, errors
from timm_jem.command_line import Arguments, make_parser, parse_flags, read_flags


@dataclass
class Weights:
    w_x: float = 1.0


@dataclass
class Training:
    steps: int = 10
    lr: float = 0.1
    eps: float | None = None
    sizes: list[float] = field(default_factory=list)
    trackers: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [1])
    flip: bool | None = None
    precision: str | None = None
    kwargs: Arguments = field(default_factory=dict)
    objective: Weights = field(default_factory=Weights)


@dataclass
class Images:
    dataset: str = "digits"
    flip: bool = False


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")


def parsed(*argv):
    parser = make_parser("some", "Some recipe.")
    parser.add_argument("model", type=str | None, nargs="?")
    parser.add_argument("--train", type=Training, default=Training())
    parser.add_argument("--data", type=Images | None, default=None)
    parser.add_argument("--output_dir", type=str | None, default=None)
    return parser.instantiate(parse_flags(parser, read_flags(parser, argv)))


def config(text: str | bytes) -> list[str]:
    Path("some.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config", "some.yaml"]


def refused(*argv) -> str:
    with pytest.raises(InputError) as error:
        parsed(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("value", ["tensorboard", "[tensorboard]", '["tensorboard"]'])
def test_a_list_takes_one_name(value):
    assert parsed("--train.trackers", value).train.trackers == ["tensorboard"]
    assert parsed(f"--train.trackers={value}").train.trackers == ["tensorboard"]
    assert parsed(*config(f"train: {{trackers: {value}, lengths: 3}}")).train.lengths == [3]
    assert parsed("--train", f"{{trackers: {value}}}").train.trackers == ["tensorboard"]


def test_a_list_takes_one_number_or_none():
    assert parsed("--train.lengths", "5").train.lengths == [5]
    assert parsed("--train.lengths", "[5, 6]").train.lengths == [5, 6]
    assert parsed("--train.lengths", "[]").train.lengths == []
    assert "train.lengths" in refused("--train.lengths", "[5")
    assert "train.lengths" in refused("--train.lengths", "long")


def test_a_number_may_be_a_fraction():
    for told in (["--train.eps", "8/255"], ["--train.eps=8/255"], config("train: {eps: 8/255}"), ["--train", "{eps: 8/255}"]):
        assert parsed(*told).train.eps == 8 / 255
    for sizes, meant in (("[1/255, 0.5,3/4]", [1 / 255, 0.5, 0.75]), ("8/255", [8 / 255]), ("[]", [])):
        assert parsed("--train.sizes", sizes).train.sizes == parsed(*config(f"train: {{sizes: {sizes}}}")).train.sizes == meant
    assert parsed("--data.dataset", "8/255", "--train.precision", "8/255").data.dataset == "8/255"
    assert parsed("--train.kwargs.a", "8/255").train.kwargs == {"a": "8/255"}


@pytest.mark.parametrize(
    "value", ["8/0", "8/255/2", "a/b", "8/", "/8", "-8/255", "8 / 255", "0x8/255", "٨/255", "8/2.5", "9" * 99 + "/1"]
)
def test_other_strokes_are_no_fraction(value):
    assert "train.eps has '" in (said := refused(f"--train.eps={value}"))
    assert said.endswith("such as 8/255")
    assert "--train.sizes has '" in refused("--train.sizes", f"[1, {value}]")
    assert "some.yaml: train.eps has '" in refused(*config(f"train: {{eps: {value}}}"))


def test_a_switch_alone_is_on():
    assert parsed("--train.flip").train.flip is True
    assert parsed("--train.flip", "--train.lr", "1").train.flip is True
    assert parsed("--train.flip", "runs/a").model == "runs/a"
    assert parsed("--train.flip", "false").train.flip is False
    assert parsed("--data.flip").data.flip is True
    assert "--train.lr has no value" in refused("--train.lr")


def test_no_is_a_word_where_words_are_asked_for():
    assert parsed(*config("train: {precision: no, flip: no}")).train.precision == "no"
    assert parsed(*config("train: {precision: no, flip: no}")).train.flip is False
    assert parsed("--train.precision", "no").train.precision == "no"


@pytest.mark.parametrize("how", ["", "=skip_default"])
def test_settings_are_printed_as_a_file_for_config(how, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--train.steps", "3", f"--print_config{how}")
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["train"]["steps"] == 3
    assert ("flip" in printed["train"]) is not bool(how)


@pytest.mark.parametrize("argv", [["--output_dir=~/x"], ["--output_dir", "~/x"]])
def test_home_is_home_after_an_equals_sign_too(argv):
    assert parsed(*argv).output_dir == "/home/someone/x"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--output-dir", "--output_dir"),
        ("--train.stepz", "--train.steps"),
        ("--steps", "--train.steps"),
        ("--Lr", None),
        ("--train.objective.wx", "--train.objective.w_x"),
        ("--dataset", "--data.dataset"),
        ("--data.dataste", "--data.dataset"),
    ],
)
def test_an_unknown_flag_names_those_it_may_mean(flag, meant):
    said = refused(flag, "3")
    assert said.startswith(f"{flag} is no setting")
    assert said.endswith("recipes/some.py --help lists them")
    assert meant is None or f"did you mean {meant}" in said
    key = flag.removeprefix("--").replace(".", ": {")
    said = refused(*config(f"{key}: 3{'}' * key.count('{')}"))
    assert said.startswith(f"some.yaml: {flag.removeprefix('--')} is no setting")


def test_an_installed_package_names_its_modules(tmp_path, monkeypatch):
    assert "; python recipes/some.py --help lists" in refused("--train.lr", "fast")
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "errors.py"))
    assert "; python -m timm_jem.recipes.some --help lists" in refused("--train.lr", "fast")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "some.yaml holds nothing: give a YAML file of settings"),
        ("# no settings yet\n", "holds nothing"),
        ("- train\n", "holds"),
        ("train: 5\n", "some.yaml: train is '5' and should be a section of settings: did you mean train.steps: 5?"),
        ("data: ./photos\n", "did you mean data.dataset: ./photos?"),
        ("train: {objective: 1}\n", "did you mean train.objective.w_x: 1?"),
        ("train: [\n", "some.yaml can't be read (parsing config"),
        ("train:\n\tsteps: 5\n", "some.yaml can't be read"),
        ("train: {lr: fast}\n", 'some.yaml: Parser key "train.lr"'),
        ("train: !!python/object/apply:os.getcwd []\n", "some.yaml can't be read"),
        ("# für später\n".encode("latin1"), "some.yaml can't be read ('utf-8' codec"),
        (b"\x00", "some.yaml can't be read"),
        ("config: other.yaml\n", "some.yaml names another file of settings, which is not read: give both"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(text, message):
    assert message in refused(*config(text))


def test_a_file_that_is_not_there_is_named():
    assert "nothing.yaml can't be read" in refused("--config", "nothing.yaml")
    assert ". can't be read" in refused("--config", ".")


def test_sections_may_be_empty():
    assert parsed(*config("train:\n")).train == Training()
    assert parsed(*config("train:\n  objective:\n  steps: 3\n")).train == Training(steps=3)


@pytest.mark.parametrize(
    ("flag", "value", "meant"),
    [
        ("--train", "5", "--train.steps 5"),
        ("--data", "./photos", "--data.dataset ./photos"),
        ("--train.objective", "2", "--train.objective.w_x 2"),
    ],
)
def test_a_section_is_no_setting(flag, value, meant):
    assert f"did you mean {meant}?" in refused(flag, value)
    assert f"did you mean {meant}?" in refused(f"{flag}={value}")


def test_a_section_takes_a_file_or_a_mapping():
    Path("train.yaml").write_text("steps: 3\ntrackers: tensorboard\n")
    for value in ("train.yaml", "{steps: 3, trackers: tensorboard}"):
        assert parsed("--train", value).train == Training(steps=3, trackers=["tensorboard"])
    assert "train.yaml: train.stepz" in refused("--train", str(Path("train.yaml").write_text("stepz: 3\n") and "train.yaml"))


def test_later_files_and_flags_override_earlier_ones():
    Path("other.yaml").write_text("train: {lr: 0.5}\n")
    told = parsed(*config("train: {lr: 1, steps: 7}"), "--config", "other.yaml", "--train.objective.w_x", "0").train
    assert (told.lr, told.steps, told.objective.w_x) == (0.5, 7, 0)


def test_quoted_text_stays_text():
    text = 'train: {kwargs: {a: "off", b: off, c: "1e3", d: 1e-3, e: ["no", 2], f: null, g: "null"}}'
    kept = {"a": "off", "b": False, "c": "1e3", "d": 1e-3, "e": ["no", 2], "f": None, "g": "null"}
    assert parsed(*config(text)).train.kwargs == kept
    assert parsed("--train.kwargs", '{"a": "off", "b": false}').train.kwargs == {"a": "off", "b": False}
    # On the command line there are no quotes left to tell.
    told = parsed(
        "--train.kwargs.a", "off", "--train.kwargs.b", "2", "--train.kwargs.c", "[1, 2.5]", "--train.kwargs.d", "silu"
    )
    assert told.train.kwargs == {"a": False, "b": 2, "c": [1, 2.5], "d": "silu"}
    assert parsed(*config("train: {kwargs: {a: 1}}"), "--train.kwargs.b", "2").train.kwargs == {"a": 1, "b": 2}
