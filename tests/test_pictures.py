"""Pictures need no pyplot, no global state and no particular thread."""
import io, os, subprocess, sys, threading, warnings
from pathlib import Path
import pytest
import torch
from PIL import Image
from deep_studio_nb.common import pictures
from deep_studio_nb.common.errors import DataError, RunError
from deep_studio_nb.common.pictures import as_pixels, image_grid, new_picture, save_picture, text_font

ROOT = Path(__file__).parents[1]

def pixels(fig): return as_pixels(Image.open(io.BytesIO(fig._repr_png_())).convert('RGB'))

def test_matplotlib_is_imported_late_and_pyplot_never():
    code = ("import sys\nimport deep_studio_nb.common.pictures as p\nprint('matplotlib' in sys.modules)\nimport matplotlib\nbefore = matplotlib.rcParams.copy()\n"
            "fig = p.image_grid([[[0., 1.], [1., 0.]]], ['한글'])\nfig._repr_png_()\nprint('matplotlib.pyplot' in sys.modules, matplotlib.rcParams.copy()==before)")
    out = subprocess.run([sys.executable, '-c', code], env=os.environ|{'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True).stdout
    assert out.split('\n')[:2]==['False', 'False True']

def test_pictures_are_drawn_in_threads():
    made = {}
    def draw(k):
        fig = new_picture(2, 1, title=f"그림 {k}")
        fig.subplots().plot([0, k])
        made[k] = fig._repr_png_()
    threads = [threading.Thread(target=draw, args=(k,)) for k in range(4)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert len(set(made.values()))==4

@pytest.mark.skipif(len(text_font())==1, reason='no font with Hangul on this machine')
def test_hangul_is_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        a,b = (pixels(new_picture(1, 0.5, title=o)) for o in ('가', '나'))
    assert (a!=b).any()   # two boxes would be alike

def test_one_warning_where_there_is_no_such_font(monkeypatch):
    monkeypatch.setattr(pictures, '_wide_fonts', lambda: [])
    pictures._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        for o in ('가', '나', 'plain'): new_picture(1, 0.5, title=o)._repr_png_()
    pictures._warn_once.cache_clear()
    assert [o.category for o in found]==[UserWarning] and 'Install one' in str(found[0].message)

def test_images_land_where_they_belong():
    "Black, white and red, in a row: read the picture back."
    images = [torch.zeros(1,4,4), torch.full((4,4), 255, dtype=torch.uint8), torch.tensor([1., 0, 0])[:,None,None].expand(3,4,4)]
    shown = pixels(image_grid(images, size=1))
    h,w = shown.shape[:2]
    assert [shown[h//2, int(w*(i+0.5)/3)].round(1).tolist() for i in range(3)]==[[0, 0, 0], [1, 1, 1], [1, 0, 0]]

@pytest.mark.parametrize('n,ncols,size', [(1, 8, (100, 100)), (3, 8, (300, 100)), (9, 4, (400, 300)), (5, 1, (100, 500))])
def test_the_grid_fits_its_images(n, ncols, size):
    assert Image.open(io.BytesIO(image_grid(torch.rand(n,1,4,4), ncols=ncols, size=1)._repr_png_())).size==size

def test_mixed_sizes_and_modes():
    images = [Image.new('L', (3, 9)), Image.new('RGBA', (50, 20)), Image.new('1', (4, 4)), Image.new('CMYK', (4, 4)), Image.new('P', (4, 4)), torch.rand(3,500,400)]
    assert image_grid(images, list('abcdef'))._repr_png_()

@pytest.mark.parametrize('bad', [torch.zeros(2,4,5), torch.zeros(8,3,4,5), torch.zeros(4), torch.zeros(4,5, dtype=torch.int64), torch.zeros(3,0,5), 'text', None])
def test_what_is_no_image(bad):
    with pytest.raises(DataError, match='is no image|no known range'): as_pixels(bad)

def test_gradients_and_strange_values():
    assert as_pixels(torch.rand(3,4,4, requires_grad=True)).shape==(4, 4, 3)
    assert as_pixels(torch.tensor([[float('inf'), -float('inf')]])).tolist()==[[1, 0]]
    assert image_grid([torch.full((4,4), float('nan'))])._repr_png_()

@pytest.mark.parametrize('name', ['curve.png', 'curve.SVG', '그림 1.pdf', 'curve.jpg'])
def test_saved_by_suffix(tmp_path, name):
    assert save_picture(new_picture(1, 1), tmp_path/name).stat().st_size>100
    assert [o.name for o in tmp_path.iterdir()]==[name]

@pytest.mark.parametrize('name', ['curve', 'curve.txt', 'curve.py'])
def test_not_saved_without_a_suffix_of_a_picture(tmp_path, name):
    with pytest.raises(RunError, match='no suffix of a picture'): save_picture(new_picture(1, 1), tmp_path/name)
    assert list(tmp_path.iterdir())==[]

def test_a_failed_save_keeps_the_old_picture(tmp_path, monkeypatch):
    path = save_picture(new_picture(1, 1), tmp_path/'curve.png')
    old,fig = path.read_bytes(), new_picture(1, 1)
    monkeypatch.setattr(fig, 'draw', lambda renderer: 1/0)
    with pytest.raises(ZeroDivisionError): save_picture(fig, path)
    assert path.read_bytes()==old and len(list(tmp_path.iterdir()))==1
