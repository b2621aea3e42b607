"""Every registered model passes the same checks, and the ResNets are torchvision's."""

import importlib
import pkgutil
import subprocess
import sys
import urllib.error

import pytest
import torch
import torch.nn.functional as F

import deep_studio_nb.models
from deep_studio_nb.common.errors import CheckpointError, ConfigError, UnknownName
from deep_studio_nb.common.registry import MODELS
from deep_studio_nb.models import resnet
from deep_studio_nb.models.interface import create_model
from deep_studio_nb.models.summary import summary

for module in pkgutil.iter_modules(deep_studio_nb.models.__path__): importlib.import_module(f'deep_studio_nb.models.{module.name}')
OURS = [name for name in MODELS.names() if MODELS.get(name).__module__.startswith('deep_studio_nb.')]
FAMILY = ['ResNet18', 'ResNet34', 'ResNet50', 'ResNet101', 'ResNet152']

LIGHT = [name for name in OURS if name not in ('ResNet101', 'ResNet152')]  # the blocks of ResNet50, and seconds a step

FACTS = dict(num_classes=3, in_channels=2, in_features=2*32*32, num_numbers=4, category_sizes=[3,5], vocab_size=20, pad_id=0)
ARGS = {'ResNet': dict(num_blocks=[1,1]), 'TableNet': dict(dropout=0.), 'UNet': dict(width=16, depth=2)}  # what a model needs beyond the facts


def make(name):
    torch.manual_seed(0)
    return create_model({'type':name, 'args':ARGS.get(name, {})}, facts=FACTS)


def items(name=''):
    "Four items as `name` takes them, and their classes."
    gen,y = torch.Generator().manual_seed(1),torch.tensor([0,1,2,1])
    if name=='TableNet': return (torch.rand(4,4, generator=gen), torch.stack([torch.randint(0, o, (4,), generator=gen) for o in (3,5)], 1)), y
    if name in ('TextCNN','BagOfWords'): return (torch.randint(1, 20, (4,12), generator=gen),), y
    x = torch.rand(4,2,32,32, generator=gen)
    return (x,), (x[:,0]*3).long() if name=='UNet' else y


@pytest.mark.parametrize('name', OURS)
def test_a_model_gives_logits_for_what_the_data_says(name):
    model,(x,y) = make(name).eval(),items(name)
    with torch.no_grad(): assert model(*x).shape == (4,3,*y.shape[1:])


@pytest.mark.parametrize('name', OURS)
def test_gradient_reaches_every_parameter(name):
    model,(x,y) = make(name),items(name)
    F.cross_entropy(model(*x), y).backward()
    assert [k for k,p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize('name', LIGHT)
def test_state_makes_the_same_model_again(name, tmp_path):
    model,(x,_) = make(name),items(name)
    model(*x)  # moves running means
    torch.save(model.state_dict(), tmp_path/'model.pt')
    other = create_model({'type':name, 'args':ARGS.get(name, {})}, facts=FACTS)
    other.load_state_dict(torch.load(tmp_path/'model.pt', weights_only=True))
    with torch.no_grad(): assert torch.equal(other.eval()(*x), model.eval()(*x))


@pytest.mark.parametrize('name', LIGHT)
def test_a_model_learns_four_items_by_heart(name):
    model,(x,y) = make(name),items(name)
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(300):
        loss = F.cross_entropy(model(*x), y)
        if loss<0.05: break
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss<0.05


@pytest.mark.parametrize('name', OURS)
def test_the_summary_counts_every_parameter_and_changes_nothing(name):
    model = make(name)
    before = {k:v.clone() for k,v in model.state_dict().items()}
    res = summary(model, items(name)[0])
    assert res.params == sum(p.numel() for p in model.parameters()) == sum(o.params for o in res.rows)
    assert not res.unused and res.ops == sum(o.ops for o in res.rows) > 0
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())


@pytest.mark.parametrize('name', FAMILY)
def test_resnets_are_those_of_torchvision(name):
    import torchvision
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name.lower())(num_classes=5)
    torch.manual_seed(0)
    ours = getattr(resnet, name)(num_classes=5)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k,v in ours.state_dict().items()), 'the same seed gives the same weights'
    x = torch.rand(2,3,64,64)
    for o in (ours, theirs): o(x), o.eval()
    with torch.no_grad(): assert torch.equal(ours(x), theirs(x))


@pytest.fixture
def weights_home(tmp_path, monkeypatch):
    "An empty folder in the place of torch's, without a network."
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'토치 home'))
    def no_network(*args, **kwargs): raise urllib.error.URLError('no route to host')
    monkeypatch.setattr('torch.hub.urlopen', no_network)
    folder = tmp_path/'토치 home'/'hub'/'checkpoints'
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize('name, file', [('ResNet18', 'resnet18-f37072fd.pth'), ('ResNet50', 'resnet50-11ad3fa6.pth')])
def test_pretrained_reads_torchs_folder(name, file, weights_home):
    known = getattr(resnet, name)().eval()
    torch.save(known.state_dict(), weights_home/file)
    x = torch.rand(2,3,64,64)
    with torch.no_grad():
        assert torch.equal(create_model(name, pretrained=True).eval()(x), known(x))
        other = create_model(name, pretrained=True, facts=dict(num_classes=7, in_channels=4)).eval()
        assert other(torch.rand(2,4,64,64)).shape == (2,7)
        one = torch.rand(2,1,64,64)
        torch.testing.assert_close(other.features(one.expand(-1,4,-1,-1)), known.features(one.expand(-1,3,-1,-1)), rtol=1e-3, atol=1e-3)


def test_a_version_of_the_weights_has_its_own_file(weights_home):
    known = resnet.ResNet50()
    torch.save(known.state_dict(), weights_home/'resnet50-0676ba61.pth')
    assert torch.equal(resnet.ResNet50(pretrained='IMAGENET1K_V1').fc.bias, known.fc.bias)
    with pytest.raises(ConfigError, match='IMAGENET1K_V1, IMAGENET1K_V2'): resnet.ResNet50(pretrained='V1')


def test_without_a_network_the_error_says_which_file_goes_where(weights_home):
    with pytest.raises(CheckpointError) as e: resnet.ResNet50(pretrained=True)
    for part in ('resnet50-11ad3fa6.pth', str(weights_home), 'https://', 'no route to host', 'pretrained: false'): assert part in str(e.value)


class Boom:
    "A pickle that runs code."
    def __reduce__(self): return (exec, ('import builtins; builtins.boom_was_here = True',))


@pytest.mark.parametrize('content', ['cut', 'text', 'empty', 'code', 'legacy code'])
def test_a_file_that_holds_no_weights_is_refused_and_not_run(content, weights_home):
    import builtins
    file = weights_home/'resnet18-f37072fd.pth'
    torch.save(resnet.ResNet18(num_classes=2).state_dict(), file)
    if content == 'cut': file.write_bytes(file.read_bytes()[:100_000])
    if content == 'text': file.write_text('<html>404</html>')
    if content == 'empty': file.write_bytes(b'')
    if content == 'code': torch.save({'fc.weight': Boom()}, file)
    if content == 'legacy code': torch.save({'fc.weight': Boom()}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match='cannot be read as weights'): resnet.ResNet18(pretrained=True)
    assert not hasattr(builtins, 'boom_was_here')


@pytest.mark.parametrize('state', [{'fc.weight': torch.zeros(3)}, {}, [1,2], {'conv1.weight': 3}])
def test_weights_of_something_else_are_refused(state, weights_home):
    torch.save(state, weights_home/'resnet18-f37072fd.pth')
    with pytest.raises(CheckpointError, match='does not fit `ResNet18`'): resnet.ResNet18(pretrained=True)


def test_a_model_of_torchvision_gets_the_classes_of_the_data():
    assert create_model('squeezenet1_1', facts=FACTS).num_classes == 3
    assert create_model('squeezenet1_1', num_classes=5, facts=FACTS).num_classes == 5
    with pytest.raises(ConfigError, match='1000 classes, the data has 3'): create_model('squeezenet1_1', weights='DEFAULT', facts=FACTS)


def test_unknown_models_and_arguments():
    with pytest.raises(UnknownName, match='ResNet50'): create_model('ResNet5O')
    with pytest.raises(ConfigError, match='did you mean `pretrained`'): create_model('ResNet18', pretraind=True)
    with pytest.raises(ConfigError, match='`num_classes` of `ResNet18`'): create_model('ResNet18', num_classes='ten')


def test_building_a_resnet_does_not_import_torchvision():
    code = "import sys; from deep_studio_nb.models.resnet import ResNet18; ResNet18(); print('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'False'
