import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from timm_jem import InputError
from timm_jem.training import Checkpoints, damage, load_tree, rank_files, save_tree
from timm_jem.training.checkpoints import shared_file
from timm_jem.training.optimizer_state import OptimizerState
from timm_jem.training.state import _writable, copy_tree, load_tensors


def tree():
    shared = torch.randn(4, generator=torch.Generator().manual_seed(0))
    return {
        "weights": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "dtype": torch.bfloat16,
        "scalar": torch.tensor(7.0),
        "shared": [shared, shared[:2]],
        "pair": (1, 0.1, -float("inf"), None, True, "é"),
        3: {"nested": [], "empty": {}, "none": torch.empty(0, 2)},
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    saved = tree()
    digest = save_tree(saved, tmp_path / "tree.safetensors")
    assert equal(load_tree(tmp_path / "tree.safetensors"), saved)
    assert save_tree(saved, tmp_path / "again.safetensors") == digest
    with pytest.raises(TypeError, match="set"):
        save_tree({"a": {1}}, tmp_path / "set.safetensors")


def test_tensors_are_copied_only_where_they_must_be():
    whole, storages = torch.randn(3, 4), set()
    assert _writable(whole, storages).data_ptr() == whole.data_ptr()
    for shared in (whole, whole[1], torch.randn(3, 4).T, torch.randn(2, 4)[:1]):
        copied = _writable(shared, storages)
        assert torch.equal(copied, shared)
        assert copied.is_contiguous()
        assert copied.data_ptr() != shared.data_ptr()


def test_a_copy_does_not_change_with_training():
    live = tree()
    copied = copy_tree(live)
    assert equal(copied, live)
    live["weights"].zero_()
    live["pair"] = ()
    assert copied["weights"].abs().sum() > 0


def test_other_models_are_refused():
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(InputError, match="see b"):
        load_tensors(target, {"a": torch.ones(2)}, "model")
    with pytest.raises(InputError, match="see b"):
        load_tensors(target, {"a": torch.ones(2), "b": torch.ones(4)}, "model")
    assert target["a"].sum() == 0


@pytest.mark.parametrize("opt", ["adam", "sgd", "lion", "adamw", "lamb", "lookahead_adam", "adopt", "kron"])
def test_an_optimizer_goes_on_bit_for_bit_in_its_layout(tmp_path, monkeypatch, opt):
    from timm.optim import create_optimizer_v2

    monkeypatch.setattr("timm.optim.kron.has_dynamo", False)  # compiling takes half a minute

    def make():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 3))
        net.to(memory_format=torch.channels_last)
        own = {"stochastic_weight_decay": True} if opt == "kron" else {}  # by a generator of its own
        optimizer = create_optimizer_v2(net, opt=opt, lr=1e-2, weight_decay=0.1, **own)
        return net, optimizer, OptimizerState(optimizer, net.named_parameters())

    def train(net, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            x = torch.randn(4, 3, 8, 8)
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer, state = make()
    train(net, optimizer, range(4))
    save_tree({"net": net.state_dict(), "optimizer": state.state_dict()}, tmp_path / "state.safetensors")
    train(net, optimizer, range(4, 8))
    other, other_optimizer, other_state = make()
    saved = load_tree(tmp_path / "state.safetensors")
    load_tensors(other.state_dict(), saved["net"], "model")
    other_state.load_state_dict(saved["optimizer"])
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    of_parameters = getattr(other_optimizer, "_base_optimizer", other_optimizer).state.values()
    moments = [value for of_parameter in of_parameters for value in of_parameter.values() if getattr(value, "ndim", 0) == 4]
    assert moments
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in moments)
    train(other, other_optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    load_tensors(other.state_dict(), saved["net"], "model")  # and back, as after a divergence
    other_state.load_state_dict(saved["optimizer"])
    train(other, other_optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_checkpoints_are_rotated_and_the_newest_whole_one_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", Accelerator(cpu=True), keep=2)
    assert checkpoints.newest() == (None, [])
    for step in (10, 20, 30):
        checkpoints.save(step, {"step": step})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_00000020", "step_00000030"]
    found, notes = checkpoints.newest()
    assert (found.name, notes) == ("step_00000030", [])
    assert [load_tree(file) for file in rank_files(found)] == [{"step": 30}]
    checkpoints.save(30, {"step": 31})  # the same step again
    assert load_tree(rank_files(found)[0]) == {"step": 31}


def test_what_is_shared_is_written_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True))
    saved = checkpoints.save(10, {"chains": torch.zeros(3)}, {"weights": torch.ones(3)})
    assert sorted(path.name for path in saved.iterdir()) == ["manifest.json", "rank_0.safetensors", "shared.safetensors"]
    assert (load_tree(rank_files(saved)[0]).keys(), load_tree(shared_file(saved)).keys()) == ({"chains"}, {"weights"})
    assert damage(saved) is None
    shared_file(saved).write_bytes(b"")
    assert damage(saved) == "shared.safetensors is not what was written"
    assert shared_file(checkpoints.save(20, {"a": 1})) is None


def test_what_a_killed_process_left_is_found_or_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), keep=1)
    checkpoints.save(10, {"a": 10})
    # Killed within the second save of a step, between the two renames, while another was half written.
    (tmp_path / "step_00000010").rename(tmp_path / ".old-step_00000010")
    (tmp_path / ".step_00000020").mkdir()
    (tmp_path / ".step_00000020" / "rank_0.safetensors").write_bytes(b"half")
    found, notes = checkpoints.newest()
    assert (load_tree(rank_files(found)[0]), notes) == ({"a": 10}, [])
    checkpoints.save(30, {"a": 30})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000030"]
    checkpoints.keep = 3
    checkpoints.save(40, {"a": 40})
    checkpoints.forget_after(30)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000030"]


def test_what_a_killed_save_had_still_to_remove_goes_at_resume(tmp_path):
    """A run that has all its steps saves no more."""
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), keep=4)
    for step in (10, 20, 30, 40):
        checkpoints.save(step, {"a": step})
    (tmp_path / "step_00000010").rename(tmp_path / ".old-step_00000010")  # 20 was the next to go
    checkpoints.keep = 2
    checkpoints.tidy(tmp_path / "step_00000040")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000030", "step_00000040"]
    (tmp_path / "step_00000040").rename(tmp_path / ".old-step_00000040")
    checkpoints.tidy(tmp_path / ".old-step_00000040")  # the one to go on from
    assert sorted(path.name for path in tmp_path.iterdir()) == [".old-step_00000040", "step_00000030"]


def test_interim_checkpoints_push_no_other_out_and_give_way_to_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), keep=2)

    def there():
        return sorted(int(path.name[-2:]) for path in tmp_path.iterdir())

    for step in (10, 20):
        checkpoints.save(step, {"a": step})
    newest = checkpoints.save(25, {"a": 25}, interim=True)
    assert there() == [10, 20, 25]
    assert checkpoints.newest()[0] == newest  # a run goes on there
    assert checkpoints.newest(before=30)[0].name == "step_00000020"  # and never goes back to it
    checkpoints.tidy(newest)
    assert there() == [10, 20, 25]
    checkpoints.save(27, {"a": 27}, interim=True)
    assert there() == [10, 20, 27]
    checkpoints.save(30, {"a": 30})
    assert there() == [20, 30]
    checkpoints.save(30, {"a": 30}, interim=True)  # stopped before the next step: it is one that would be anyway
    checkpoints.save(40, {"a": 40})
    assert there() == [30, 40]
    (tmp_path / "step_00000030" / "manifest.json").write_text("{")
    checkpoints.save(50, {"a": 50})
    assert there() == [40, 50]


@pytest.mark.parametrize(
    "harm", ["truncate", "flip", "no file", "no manifest", "bad manifest", "empty manifest", "no rank", "deep"]
)
def test_damage_is_found_and_an_older_one_taken(tmp_path, harm):
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), keep=2)
    older = checkpoints.save(10, {"a": torch.arange(1000)})
    newer = checkpoints.save(20, {"a": torch.arange(1000)})
    file, manifest = newer / "rank_0.safetensors", newer / "manifest.json"
    content = bytearray(file.read_bytes())
    if harm == "truncate":
        file.write_bytes(content[:-100])
    elif harm == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "no file":
        file.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "no rank":
        manifest.write_text(json.dumps({"sha256": {"manifest.json": ""}}))
    elif harm == "deep":
        manifest.write_text("[" * 100_000)
    else:
        manifest.write_text("{" if harm == "bad manifest" else '{"sha256": {}}')
    assert damage(older) is None
    found, notes = checkpoints.newest()
    assert found == older
    assert len(notes) == 1
    assert "step_00000020 is passed over" in notes[0]
    assert "\n" not in notes[0]


def test_a_tree_without_end_is_no_state(tmp_path):
    save_file({"0": torch.zeros(1)}, tmp_path / "a", metadata={"tree": '["list", [' * 100_000})
    with pytest.raises(InputError, match=r"a is not a whole saved state .*: take an older one"):
        load_tree(tmp_path / "a")


def test_what_can_not_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", Accelerator(cpu=True), keep=1)
    checkpoints.save(10, {"a": torch.arange(10)})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("save_tree", "_sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(f"timm_jem.training.checkpoints.{name}", full)
            with pytest.raises(InputError, match=r"No space left on device.*earlier ones are whole"):
                checkpoints.save(20, {"a": torch.arange(10)})
            if name == "save_tree":
                with pytest.raises(InputError, match=r"No space left on device.*there is no earlier one"):
                    Checkpoints(tmp_path / "new", Accelerator(cpu=True)).save(20, {"a": 1})
        assert damage(tmp_path / "checkpoints" / "step_00000010") is None
    checkpoints.save(30, {"a": torch.arange(10)})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000030"]
