"""Tensors that several processes hold in parts (torch's DTensors), and whole tensors put into such a place."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its storage; a tensor that is not in parts is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, on the device and in the parts of another of its shape; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
