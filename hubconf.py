"""The trained ResNet-20 for other projects, by torch.hub.

For example:
    network = torch.hub.load("path/to/this/project", "resnet20", pretrained=True, source="local")
"""

from cifar_resnet.checkpoint import PRETRAINED, read_checkpoint
from resnet_module import ResNetModule

dependencies = ["torch", "lightning", "torchmetrics", "jsonargparse", "torchvision", "PIL"]


def resnet20(pretrained: bool = False) -> ResNetModule:
    """A ResNet-20 for CIFAR-10: option A of He et al. 2015 (arXiv:1512.03385), SiLU for ReLU.

    It maps float images (N, 3, 32, 32) in [0, 1] to logits (N, 10).

    Args:
        pretrained: Take the weights of `weights/resnet20.ckpt`, and their scaling of the input. The
            network is then in eval mode, and `class_names` has the names of the logits.
    """
    if pretrained:
        return ResNetModule.from_checkpoint(read_checkpoint(PRETRAINED))
    return ResNetModule(shortcut="pad", activation="silu")
