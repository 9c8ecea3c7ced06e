import hashlib
import random

import pytest
import safetensors.torch
import torch

from timm_iebn.training.checkpoint import CheckpointError, load_latest, read_checkpoint, save_checkpoint


def draw_state():
    return dict(
        epoch=3,
        rows=[dict(loss=0.1 + random.random(), top1=1.0)],
        nothing=None,
        model={"a.weight": torch.randn(3, 4), "count": torch.tensor(7), "empty": torch.empty(0)},
        optimizer=dict(
            state={0: dict(step=5, buffer=torch.randn(2).bfloat16())}, param_groups=[dict(betas=(0.9, 0.99))]
        ),
        flags=torch.tensor([True, False]),
        kinds=(torch.bfloat16, [(1, torch.ones(2)), ()]),
    )


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert type(a) is type(b) and a == b


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = draw_state()
    assert_same(read_checkpoint(save_checkpoint(tmp_path, 5, state)), state)


def test_channels_last_and_shared_tensors_are_saved(tmp_path):
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = read_checkpoint(save_checkpoint(tmp_path, 1, dict(a=weight, b=weight)))
    assert torch.equal(state["a"], weight) and torch.equal(state["b"], weight)


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 30, 400):
        save_checkpoint(tmp_path, step, dict(step=step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000030.safetensors", "000000400.safetensors"]
    path, state = load_latest(tmp_path)
    assert path.name == "000000400.safetensors" and state == dict(step=400)


def test_every_cut_and_every_changed_byte_is_noticed_or_changes_nothing(tmp_path):
    """What changes nothing is one white space for another behind the header."""
    state = draw_state()
    path = save_checkpoint(tmp_path, 1, state)
    whole = path.read_bytes()
    for _ in range(300):
        torn = bytearray(whole)
        if random.random() < 0.3:
            del torn[random.randrange(len(torn)) :]
        else:
            torn[random.randrange(len(torn))] ^= random.randrange(1, 256)
        path.write_bytes(torn)
        try:
            assert_same(read_checkpoint(path), state)
        except CheckpointError as e:
            assert "000000001.safetensors is not a whole checkpoint" in str(e)


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path):
    save_checkpoint(tmp_path, 1, dict(step=1))
    torn = save_checkpoint(tmp_path, 2, dict(step=2))
    torn.write_bytes(torn.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="000000002.*not a whole checkpoint.*the one before"):
        path, state = load_latest(tmp_path)
    assert path.name == "000000001.safetensors" and state == dict(step=1)


def test_a_checkpoint_that_cannot_be_read_is_not_called_torn(tmp_path):
    """A disk that is away for a moment must not cost the newest checkpoint."""
    save_checkpoint(tmp_path, 1, dict(step=1))
    (tmp_path / "000000002.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="can't read .*000000002.safetensors"):
        load_latest(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.filterwarnings("ignore:.*not a whole checkpoint")
def test_where_none_is_whole_that_is_an_error_and_where_there_is_none_it_is_not(tmp_path):
    assert load_latest(tmp_path) is None
    save_checkpoint(tmp_path, 1, {}).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    "tree", ["{", '{"list": 5}', '{"tensor": "a"}', '{"dict": [1]}', '{"dtype": "x"}', "[" * 99999]
)
def test_a_whole_file_of_another_writer_is_no_torn_one(tmp_path, tree):
    """It is not removed, and what came before does not take its place."""
    save_checkpoint(tmp_path, 1, dict(step=1))
    metadata = dict(tree=tree, sha256=hashlib.sha256(tree.encode()).hexdigest())
    (tmp_path / "000000002.safetensors").write_bytes(safetensors.torch.save({}, metadata))
    with pytest.raises(CheckpointError, match="000000002.safetensors is whole, but no checkpoint as this version"):
        load_latest(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path):
    before = save_checkpoint(tmp_path, 1, dict(step=1))
    (tmp_path / "000000002.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="000000002.safetensors: the disk is full; .* MB are needed"):
        save_checkpoint(tmp_path, 2, draw_state())
    assert [p.name for p in tmp_path.iterdir()] == [before.name] and read_checkpoint(before) == dict(step=1)
