"Test-time augmentation: ways there and back, models that do not care, draws that repeat, and data that has only one way to be read."
import weakref
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from toy_data import write_masks
from deep_studio_nb.common.errors import DataError
from deep_studio_nb.common.randomness import rng_state
from deep_studio_nb.data.digits import Digits
from deep_studio_nb.data.loaders import DataLoader
from deep_studio_nb.data.transforms import build_transforms
from deep_studio_nb.evaluation.rows import probabilities
from deep_studio_nb.evaluation.tta import VIEWS, View, WithViews, check_tta, draw_outputs, drawing_loader, tta_outputs
from deep_studio_nb.experiments.experiment import Experiment
from deep_studio_nb.experiments.trained import load_trained
from deep_studio_nb.models.cnn import SimpleCNN
from deep_studio_nb.models.unet import UNet

EXACT = [(name, o) for name in ('flip', 'flips', 'd4') for o in VIEWS[name]]

# --- ways there and back ---

@pytest.mark.parametrize('view', [o for _,o in EXACT], ids=[f'{k}: {o.name}' for k,o in EXACT])
@pytest.mark.parametrize('size', [(1, 1), (5, 5), (6, 6)])
def test_the_way_back_is_exact(view, size):
    x = torch.randn(2, 3, *size)
    assert torch.equal(view.back(view.there(x)), x) and torch.equal(view.there(view.back(x)), x)

@pytest.mark.parametrize('name', ['flip', 'flips'])
def test_mirrors_are_for_pictures_of_any_shape(name):
    x = torch.randn(1, 2, 3, 7)
    for o in VIEWS[name]: assert torch.equal(o.back(o.there(x)), x) and not o.square

def test_the_eight_views_are_a_group():
    "One view after another is again one of the eight."
    x = torch.arange(9.).view(1, 1, 3, 3)
    all_of_them = {tuple(o.there(x).flatten().tolist()) for o in VIEWS['d4']}
    assert len(all_of_them)==8
    assert {tuple(b.there(a.there(x)).flatten().tolist()) for a in VIEWS['d4'] for b in VIEWS['d4']}==all_of_them

@pytest.mark.parametrize('name', list(VIEWS))
def test_pictures_are_left_as_they_are(name):
    x = torch.rand(2, 1, 16, 16)
    before = x.clone()
    tta_outputs(SimpleCNN(num_classes=3, in_channels=1, width=8), x, name)
    assert torch.equal(x, before)

# --- models ---

class Blurred(nn.Module):
    "Turns with the picture, pixel by pixel."
    def forward(self, x): return torch.cat([F.avg_pool2d(x, 3, 1, 1), -x, x*x], 1)

class Sorted(nn.Module):
    "Says the same of any order of the pixels."
    def forward(self, x): return x.flatten(1).sort(1).values[:, ::7]

@pytest.mark.parametrize('name', ['flip', 'flips', 'd4'])
@pytest.mark.parametrize('task', ['mask', 'image'])
def test_a_model_that_turns_with_the_picture_gains_nothing(name, task):
    x, same = torch.randn(2, 1, 9, 9), dict(mask=lambda o: o.softmax(1), image=lambda o: o)[task]
    torch.testing.assert_close(same(tta_outputs(Blurred(), x, name, task)), same(Blurred()(x)))

@pytest.mark.parametrize('name', ['flip', 'flips', 'd4'])
@pytest.mark.parametrize('task', ['classes', 'labels', 'number'])
def test_a_model_that_does_not_care_gains_nothing(name, task):
    x, same = torch.randn(2, 1, 9, 9), dict(classes=lambda o: o.softmax(1), labels=lambda o: o.sigmoid(), number=lambda o: o)[task]
    torch.testing.assert_close(same(tta_outputs(Sorted(), x, name, task)), same(Sorted()(x)))

def test_masks_are_averaged_by_hand():
    net, x = UNet(num_classes=3, width=4, depth=2).eval(), torch.rand(2, 3, 8, 12)
    with torch.no_grad(): by_hand = (net(x).softmax(1)+net(x.flip(-1)).softmax(1).flip(-1))/2
    torch.testing.assert_close(tta_outputs(net, (x, torch.zeros(2, 8, 12)), 'flip', 'mask').exp(), by_hand, atol=1e-5, rtol=1e-4)

def test_the_answer_turns_with_the_picture():
    "With all eight views any model becomes one that turns with the picture."
    net, x = UNet(num_classes=2, width=4, depth=2).eval(), torch.rand(1, 3, 12, 12)
    for view in VIEWS['d4']:
        torch.testing.assert_close(tta_outputs(net, view.there(x), 'd4', 'mask'), view.there(tta_outputs(net, x, 'd4', 'mask')), atol=1e-4, rtol=1e-4)

def test_one_pass_a_view_and_one_answer_at_a_time():
    class Watched(nn.Module):
        calls, most, alive = 0, 0, weakref.WeakSet()
        def forward(self, x):
            out = x.mean((2, 3))*torch.ones(1, 4)
            self.alive.add(out)
            Watched.calls, Watched.most = self.calls+1, max(self.most, len(self.alive))
            return out
    tta_outputs(Watched(), torch.rand(2, 1, 8, 8), 'd4')
    assert (Watched.calls, Watched.most)==(8, 2)      # the first is kept, in case it stays the only one

def test_views_of_ones_own():
    dark = View('dark', lambda x: x*0.5)
    x = torch.rand(3, 2, 4, 4)
    class Mean(nn.Module):
        def forward(self, x): return x.mean((2, 3))
    torch.testing.assert_close(tta_outputs(Mean(), x, [dark], 'number'), x.mean((2, 3))/2)
    with pytest.raises(DataError, match='`dark` there is no exact way back'): WithViews(Mean(), [dark], 'mask')

def test_a_model_that_fails_for_its_own_reasons_is_not_blamed_on_the_view():
    class Broken(nn.Module):
        def forward(self, x): raise RuntimeError('out of luck')
    with pytest.raises(RuntimeError, match='out of luck'): tta_outputs(Broken(), torch.rand(1, 1, 4, 4), 'flip')
    with pytest.raises(DataError, match='out of luck'): tta_outputs(Broken(), torch.rand(1, 1, 4, 4), VIEWS['scales'][1:])

def test_models_with_several_outputs_are_refused():
    class Two(nn.Module):
        def forward(self, x): return x.mean((2, 3)), x
    with pytest.raises(DataError, match='not with one tensor'): tta_outputs(Two(), torch.rand(1, 1, 4, 4), 'flip')

# --- draws ---

MOVES = {'train': [dict(type='RandomAffine', args=dict(degrees=15, translate=[0.1, 0.1], interpolation='bilinear'))], 'valid': []}

@pytest.fixture
def loader(digits):
    ds = Digits(digits, split='test').with_transforms(build_transforms(MOVES)).using('test')
    return lambda size=128, **kw: DataLoader(ds, size, shuffle=False, **dict(dict(num_workers=0), **kw))

def test_draws_depend_on_sample_and_view_alone(loader):
    "Not on batches, workers, seeds, the global generators or what was drawn before."
    first = torch.cat([x for x,_ in drawing_loader(loader())])
    torch.manual_seed(5)
    for other in (loader(7), loader(64, num_workers=2), loader(100, seed=3)): assert torch.equal(torch.cat([x for x,_ in drawing_loader(other)]), first)
    again = drawing_loader(loader())
    again.set_epoch(2)
    third = torch.cat([x for x,_ in again])
    assert not torch.equal(first, third)
    plain = drawing_loader(loader())
    assert torch.equal([torch.cat([x for x,_ in plain]) for _ in range(3)][2], third)

def test_draws_disturb_no_generator(loader):
    net = SimpleCNN(num_classes=10, in_channels=1, width=8)
    before = rng_state()
    draw_outputs(net, loader(), 1)
    after = rng_state()
    assert torch.equal(before['torch'], after['torch']) and before['python']==after['python'] and before['numpy']==after['numpy']

def test_more_draws_include_the_fewer(loader):
    "The sums of 3 draws are those of 2 and one more; none at all is the model as it is."
    net = SimpleCNN(num_classes=10, in_channels=1, width=8)
    p = [torch.cat([probabilities(o) for o,_ in draw_outputs(net, loader(), n)]) for n in (0, 1, 2)]
    again = drawing_loader(loader())
    again.set_epoch(1)
    with torch.no_grad(): second = probabilities(net.eval()(torch.cat([x for x,_ in again])))
    torch.testing.assert_close(p[2]*3-p[1]*2, second, atol=1e-5, rtol=1e-4)

# --- runs ---

def run(name, folder, **parts):
    cfg = dict(dict(name=name, seed=0, data_loader=dict(type='DataLoader', args=dict(batch_size=8)), optimizer=dict(type='AdamW', args=dict(lr=0.01)),
                    trainer=dict(epochs=1, save_dir=str(folder/'experiments'))), **parts)
    exp = Experiment(cfg, device='cpu')
    exp.fit()
    return load_trained(exp.folder.path, device='cpu')

@pytest.fixture(scope='session')
def masked(tmp_path_factory):
    "A run that finds the bright part of pictures."
    folder = tmp_path_factory.mktemp('masked')
    write_masks(folder/'data', train=8, test=4)
    return run('masks', folder, dataset=dict(type='ImageMasks', args=dict(data_dir=str(folder/'data'), classes=['dark', 'bright'])), loss='cross_entropy',
               arch=dict(type='UNet', args=dict(width=4, depth=2)), metrics=['dice'], transforms=dict(train=['RandomHorizontalFlip'])), folder

def test_a_run_of_masks_is_scored_from_all_sides(masked):
    trained, _ = masked
    loader = trained.splits().in_order('test')
    with torch.no_grad(): by_hand = torch.cat([tta_outputs(trained.model, x, 'd4', 'mask').argmax(1) for x,_ in loader])
    ev = trained.evaluate('test', tta='d4')
    assert ev.task=='mask' and torch.equal(ev.preds.long(), by_hand)
    assert set(ev.metrics)==set(trained.evaluate('test').metrics)

@pytest.mark.parametrize('tta', ['crops', 'scales', 4, [View('dark', lambda x: x/2)]])
def test_masks_refuse_views_without_a_way_back(masked, tta):
    for ask in (lambda: masked[0].evaluate('test', tta=tta), lambda: masked[0].predict_files(['nowhere.png'], tta=tta)):
        with pytest.raises(DataError, match='exact way back'): ask()

def test_masks_of_files_have_the_size_of_the_files(masked, tmp_path):
    trained, _ = masked
    Image.new('RGB', (20, 12), (200, 30, 30)).save(tmp_path/'wide.png')
    ev, bad = trained.predict_files([tmp_path/'wide.png'], tta='flips')
    assert ev.preds.shape==(1, 12, 20) and not bad
    x = trained._as_in_training()(trained._read(tmp_path/'wide.png'))[None]
    assert torch.equal(ev.preds.long(), tta_outputs(trained.model, x, 'flips', 'mask').argmax(1))
    with pytest.raises(DataError, match='12 x 20'): trained.predict_files([tmp_path/'wide.png'], tta='d4')

@pytest.fixture(scope='session')
def moved(digits):
    return run('moved', digits.parent, dataset=dict(type='ImageFolder', args=dict(data_dir=str(digits))), loss='cross_entropy', metrics=['accuracy'],
               data_loader=dict(type='DataLoader', args=dict(batch_size=256)), arch=dict(type='SimpleCNN', args=dict(width=8)), transforms=MOVES)

def test_a_run_is_scored_by_draws_of_its_training(moved):
    a, b = (moved.evaluate('test', tta=o) for o in (2, '2'))
    assert torch.equal(a.preds, b.preds) and a.ids==moved.evaluate('test').ids
    by_hand = torch.cat([o for o,_ in draw_outputs(moved.model, moved.splits().in_order('test'), 2)])
    assert torch.equal(a.preds, by_hand)
    assert a.metrics['loss']==pytest.approx(F.cross_entropy(a.preds, a.targets).item(), abs=1e-5)

def test_files_are_drawn_alike_in_any_batch(moved, digits):
    files = sorted((digits/'test'/'4').glob('*.png'))[:9]
    all_at_once = moved.predict_files(files, tta=3)[0]
    few = moved.predict_files(files[4:6], tta=3, batch_size=1)[0]
    torch.testing.assert_close(few.preds, all_at_once.preds[4:6], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(all_at_once.preds, moved.predict_files(files)[0].preds, atol=1e-3)

@pytest.mark.parametrize('tta', ['flip', 'flips', 'd4', 'crops', 'scales'])
def test_a_run_is_scored_by_named_views(moved, tta):
    ev = moved.evaluate('test', tta=tta)
    x, y = next(iter(moved.splits().in_order('test')))
    torch.testing.assert_close(probabilities(ev.preds[:len(x)]), probabilities(tta_outputs(moved.model, x, tta)), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('what, tta', [('moved', 2), ('moved', 'flips'), ('masked', 'd4')])
def test_a_cell_scores_as_the_run_does(what, tta, request):
    trained = request.getfixturevalue(what)
    trained = trained[0] if what=='masked' else trained
    exp = Experiment(trained.config, device='cpu')
    exp.model.load_state_dict(trained.model.state_dict())
    here, there = exp.evaluate('test', tta), trained.evaluate('test', tta)
    assert torch.equal(here.preds, there.preds) and here.ids==there.ids and dict(here.metrics)==pytest.approx(dict(there.metrics))
    assert here.metrics['loss']!=exp.evaluate('test').metrics['loss']

def test_tables_and_texts_are_refused_in_plain_words(tmp_path):
    (tmp_path/'t.csv').write_text('a,b,price\n'+'\n'.join(f'{i},{i%3},{2*i+1}' for i in range(40)))
    (tmp_path/'x.csv').write_text('text,label\n'+'\n'.join(f'{"good nice" if i%2 else "bad poor"} word{i%5},{"yes" if i%2 else "no"}' for i in range(40)))
    split = dict(type='DataLoader', args=dict(batch_size=8, test_split=0.2, validation_split=0.2))
    table = run('table', tmp_path, dataset=dict(type='Table', args=dict(file=str(tmp_path/'t.csv'), target='price')), arch='MLP', loss='mse_loss', data_loader=split)
    with pytest.raises(DataError, match='rows of a table.*Leave `tta` out.*ensemble of several runs'): table.evaluate('test', tta='flip')
    with pytest.raises(DataError, match='rows of a table'): table.predict_files([tmp_path/'t.csv'], tta=4)
    text = run('text', tmp_path, dataset=dict(type='TextFile', args=dict(file=str(tmp_path/'x.csv'), text='text', target='label')), arch='BagOfWords', loss='cross_entropy', data_loader=split)
    with pytest.raises(DataError, match='but the inputs are texts'): text.evaluate('test', tta='flip')

@pytest.mark.parametrize('tta, words', [('flop', 'did you mean `flip`'), (-2, 'at least 1'), (2.5, 'number of random draws'), ({}, 'number of random draws'), (True, 'at least 1'), ([], 'no view')])
def test_what_is_no_view_is_refused(tta, words):
    with pytest.raises(DataError, match=words): check_tta(tta, 'classes', 'image')
