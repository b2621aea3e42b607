"""What a person sees and presses in JupyterLab, in a real browser."""
import json
import pytest

pytest.importorskip('jupyterlab', reason='JupyterLab is missing: pip install -e ".[dev]"')
pytest.importorskip('playwright', reason='playwright is missing: pip install -e ".[dev]"')
from jupyterlab_driver import JupyterLab, chromium

pytestmark = pytest.mark.skipif(not chromium(), reason='no browser: apt-get install chromium, or name one in the variable CHROMIUM')

def write_notebook(path, *cells):
    "A notebook of code cells."
    made = [dict(cell_type='code', id=f'c{i}', metadata={}, source=o, outputs=[], execution_count=None) for i,o in enumerate(cells)]
    spec = dict(display_name='python3', language='python', name='python3')
    path.write_text(json.dumps(dict(cells=made, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)))

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with JupyterLab(tmp_path_factory.mktemp('lab')) as lab: yield lab

def test_widgets_redraw_and_errors_are_seen(lab):
    write_notebook(lab.root/'widgets.ipynb', 'import ipywidgets as w\nfrom matplotlib.figure import Figure',
        '''def draw(n):
    fig = Figure(figsize=(3, 1))
    fig.subplots().plot(range(n))
    return fig
w.interactive(lambda n: display(draw(n)), n=w.IntSlider(2, 2, 9))''', '1/0', 'print("not reached")')
    with lab.open('widgets.ipynb', lab.root/'widgets.png') as nb:
        nb.run_all()
        assert nb.errors()==[(3, 'ZeroDivisionError: division by zero')]
        assert nb.text(4)==''
        picture = nb.cell(2).locator('.jp-OutputArea-output img').last
        before = nb.settle(picture)
        nb.cell(2).locator('.noUi-handle').press('ArrowRight')
        nb.wait_change(picture, before)

def test_the_stop_button_interrupts_a_running_cell(lab):
    write_notebook(lab.root/'stop.ipynb', 'import time', '''try:
    print("running", flush=True)
    while True: time.sleep(.01)
except KeyboardInterrupt: print("stopped")''', 'print("alive")')
    with lab.open('stop.ipynb', lab.root/'stop.png') as nb:
        nb.run(1)
        nb.run(2, wait=False)
        nb.wait_text(nb.cell(2), 'running')
        nb.stop()
        nb.wait_text(nb.cell(2), 'stopped')
        nb.run(3)
        assert nb.text(3).strip()=='alive'
