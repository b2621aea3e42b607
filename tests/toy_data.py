"What tests train on where any data would do."
import json
from pathlib import Path
import numpy as np
from PIL import Image

DOTS = '''
import torch
from deep_studio_nb.common.registry import DATASETS
from deep_studio_nb.data.tensors import Tensors

@DATASETS.register
class ToyDots(Tensors):
    "Points, and whether they lie in the first or third quarter."
    def __init__(self):
        x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
        super().__init__(x, (x[:, 0]*x[:, 1] > 0).long(), classes=['no', 'yes'])
'''

def write_dots(folder, **arch):
    "Write `dots.json`, the config of a small net, and the module that it imports."
    config = dict(name='dots', seed=0, imports=['toy_dots'], dataset='ToyDots', data_loader=dict(type='DataLoader', args=dict(batch_size=16, validation_split=0.25)),
                  arch=dict(type='MLP', args=dict(hidden=[4], **arch)), loss='cross_entropy', optimizer=dict(type='AdamW', args=dict(lr=0.01)),
                  trainer=dict(epochs=3, monitor='min val_loss', threads=1, save_period=0), device='cpu')
    Path(folder, 'toy_dots.py').write_text(DOTS)
    Path(folder, 'dots.json').write_text(json.dumps(config))

def write_masks(folder, **counts):
    "Write pictures with a bright part and its mask; `counts` are those of the splits."
    rng = np.random.default_rng(0)
    for split,n in counts.items():
        for o in ('images', 'masks'): Path(folder, split, o).mkdir(parents=True)
        for i in range(n):
            mask = np.zeros((16, 16), np.uint8)
            mask[i:i+6, 3:12] = 1
            Image.fromarray((mask*150+rng.integers(0, 80, mask.shape)).astype(np.uint8)).convert('RGB').save(Path(folder, split, 'images', f'{i}.png'))
            Image.fromarray(mask).save(Path(folder, split, 'masks', f'{i}.png'))
