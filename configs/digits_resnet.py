# The quickstart with a ResNet of its own depth. A config in Python can compute its values;
# names that begin with an underscore are not part of it.
#   deep-studio train configs/digits_resnet.py
_blocks = [1, 1, 1, 1]
_layers = 2 + 2*sum(_blocks)

name = f"digits-resnet{_layers}"
base = "quickstart.yaml"
arch = {"type": "ResNet", "args": {"num_blocks": _blocks, "stem": "small"}}
