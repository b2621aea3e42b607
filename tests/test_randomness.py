"""Random numbers follow from what they are for, and nobody's stream is disturbed."""
import os, random, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from deep_studio_nb.common.errors import CheckpointError
from deep_studio_nb.common.randomness import derive, generator, rng_state, seed_all, seeded, set_rng_state

ROOT = Path(__file__).parents[1]

def run(code, *args, **env):
    "What another process prints."
    env = os.environ | {'PYTHONPATH': str(ROOT)} | env
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], env=env, capture_output=True, text=True, check=True).stdout

@pytest.fixture(autouse=True)
def own_state():
    "Whatever a test does to the global generators ends with it."
    before = rng_state()
    yield
    set_rng_state(before)

def draw(): return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
def normals(): return torch.randn(1).item(), np.random.randn(), random.gauss(0, 1)

# Seeds

@pytest.mark.parametrize('hashseed', ['0', '1', 'random'])
def test_the_same_seed_in_every_process(hashseed):
    out = run("from deep_studio_nb.common.randomness import derive, generator\nprint(derive(0, 'order', 3), derive('가', -1), generator(5).initial_seed())", PYTHONHASHSEED=hashseed)
    assert out.split()==[str(derive(0, 'order', 3)), str(derive('가', -1)), str(derive(5))]

def test_seeds_are_pinned():
    "Old runs could not be repeated if these changed."
    assert [derive(), derive(0), derive(0, 'order', 1), derive('가', -1)]==PINNED

PINNED = [8238016292129134938, 6197665364228624309, 4291203057319691273, 6188660146638092732]

def test_no_two_keys_share_a_seed():
    keys = [(a,) for a in range(-50, 50)] + [(a, b) for a in range(50) for b in range(50)] + [(str(a),) for a in range(100)] + [(str(a), b) for a in range(50) for b in range(50)] + [(a, str(b)) for a in range(50) for b in range(50)]
    assert len({derive(*o) for o in keys})==len(keys)

@pytest.mark.parametrize('key', [0.5, None, b'x', (1, 2), torch.tensor(0.5)])
def test_keys_are_words_and_whole_numbers(key):
    with pytest.raises(TypeError): derive(key)

def test_numbers_of_other_libraries_are_numbers(): assert derive(np.int32(3)) == derive(torch.tensor(3)) == derive(3)

def test_generators_are_alike_and_apart():
    assert torch.equal(torch.rand(9, generator=generator(1, 'x')), torch.rand(9, generator=generator(1, 'x')))
    assert not torch.equal(torch.rand(9, generator=generator(1, 'x')), torch.rand(9, generator=generator(1, 'y')))

# Blocks

@pytest.mark.parametrize('before', range(4))
def test_the_outer_streams_go_on(before):
    "With an odd number of normal draws before it, there is a spare one that must not be lost."
    def stream(disturb):
        seed_all('outer')
        for _ in range(before): normals()
        disturb()
        return [normals() for _ in range(5)], draw()
    def disturb():
        with seeded(1):
            normals()
            with seeded(2): draw()
            np.random.seed(7), random.seed(7), torch.manual_seed(7)
    assert stream(disturb)==stream(lambda: None)

def test_the_outer_streams_go_on_after_an_error():
    seed_all(3)
    expected = draw()
    seed_all(3)
    with pytest.raises(KeyError):
        with seeded(1): raise KeyError(draw())
    assert draw()==expected

def test_what_is_drawn_depends_on_the_keys_alone():
    with seeded(0, 'crop', 5): first = draw(), normals()
    seed_all(99), normals()
    with seeded(0, 'crop', 5): assert (draw(), normals())==first
    with seeded(0, 'crop', 6): assert (draw(), normals())!=first

def test_other_bit_generators_survive():
    "NumPy's global generator need not be the usual one."
    usual = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        state = rng_state()
        expected = np.random.rand(3).tolist()
        set_rng_state(state)
        with seeded(1): np.random.rand()
        assert np.random.rand(3).tolist()==expected
    finally: np.random.set_bit_generator(usual)

class Noise(Dataset):
    "Samples that are random numbers."
    def __len__(self): return 12
    def __getitem__(self, i):
        with seeded(0, i): return torch.rand(1), np.random.rand(), random.random()

def test_workers_draw_what_the_main_process_draws():
    alone,helped = ([torch.stack([o.flatten().double() for o in b]) for b in DataLoader(Noise(), batch_size=4, num_workers=n, multiprocessing_context='fork' if n else None)] for n in (0, 2))
    assert all(torch.equal(a, b) for a,b in zip(alone, helped, strict=True))

# Whole processes

def test_seed_all_seeds_everything():
    assert seed_all(0, 'run')==derive(0, 'run')
    first = draw()
    seed_all(0, 'run')
    assert draw()==first
    seed_all(1, 'run')
    assert draw()!=first

def test_importing_and_building_seeds_nothing():
    seed_all(4)
    expected = draw()
    seed_all(4)
    generator(1), derive(2), seeded(3)
    assert draw()==expected

RESUME = """
import sys, torch, random, numpy as np
from deep_studio_nb.common.randomness import set_rng_state
set_rng_state(torch.load(sys.argv[1], weights_only=True))
print([torch.randn(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]])
"""

def test_state_goes_on_in_another_process(tmp_path):
    seed_all(1), normals()
    torch.save(rng_state(), tmp_path/'rng.pt')
    expected = [torch.randn(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]]
    assert run(RESUME, tmp_path/'rng.pt').strip()==str(expected)

def test_a_state_from_a_gpu_goes_on_without():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    set_rng_state(rng_state()|{'cuda': [torch.zeros(16, dtype=torch.uint8)]})

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_state_of_a_gpu():
    torch.cuda.init()
    seed_all(5)
    torch.rand(3, device='cuda')
    state = rng_state()
    expected = torch.rand(3, device='cuda')
    set_rng_state(state)
    assert 'cuda' in state and torch.equal(torch.rand(3, device='cuda'), expected)

@pytest.mark.parametrize('change', [{'torch': torch.zeros(3)}, {'numpy': {}}, {'numpy': None}, {'python': [3, [1, 2], None]}, {'python': None}])
def test_broken_states(change):
    with pytest.raises(CheckpointError, match='cannot be put back'): set_rng_state(rng_state()|change)
