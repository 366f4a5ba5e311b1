"""Weights of four bits as GPTQ packs them; its order of inputs (act-order) is read as well.

qweight int32 (in / 8, out): eight inputs a word; qzeros int32 (groups, out / 8): eight outputs a
word, each less by one in the first version of the format; scales (groups, out); g_idx (in,): the
group of each input. weight = (q - zero) * scale.
"""

import torch
from torch import Tensor, nn

from kd.models.packed_linear import PackedLinear, frozen, stored_dtype
from kd.models.tensor_files import TensorFiles

NUMBERS = 2**24  # formed at one time


class GptqLinear(PackedLinear):
    def __init__(self, linear: nn.Linear, name: str, files: TensorFiles, settings: dict):
        super().__init__(linear, name, files)
        group = settings["group_size"]
        groups = 1 if group == -1 else -(-self.in_features // group)
        self.qweight = frozen((self.in_features // 8, self.out_features), torch.int32)
        self.qzeros = frozen((groups, self.out_features // 8), torch.int32)
        self.scales = frozen((groups, self.out_features), stored_dtype(files, f"{name}.scales"))
        self.g_idx = frozen((self.in_features,), torch.int32)
        self.less_by_one = settings.get("checkpoint_format", "gptq") == "gptq"

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        zeros = unpack(self.qzeros).flatten(1)  # (groups, out)
        if self.less_by_one:
            zeros = (zeros + 1) & 15
        weight = torch.empty(self.in_features, self.out_features, dtype=dtype, device=zeros.device)
        step = max(1, NUMBERS // (8 * self.out_features))  # words
        for start in range(0, len(self.qweight), step):
            # (words, out, 8) -> (inputs, out)
            numbers = unpack(self.qweight[start : start + step]).transpose(1, 2).flatten(0, 1)
            rows = slice(8 * start, 8 * start + len(numbers))
            group = self.g_idx[rows]
            weight[rows] = (numbers - zeros[group]) * self.scales[group].float()
        return weight.T


def unpack(words: Tensor) -> Tensor:
    """(..., 8) numbers 0..15 of int32 words."""
    return (words[..., None] >> (4 * torch.arange(8, device=words.device))) & 15


def check_gptq(settings: dict, name: str) -> None:
    """Raises ValueError where quantization_config is of another layout."""
    form = settings.get("checkpoint_format", "gptq")
    if settings.get("bits") != 4 or form not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{name}: GPTQ with bits {settings.get('bits')}, checkpoint_format {form}; wanted "
            "bits 4 and gptq or gptq_v2"
        )


def gptq_layer(
    linear: nn.Linear, name: str, files: TensorFiles, settings: dict
) -> GptqLinear | None:
    if f"{name}.qweight" not in files.tensors:
        return None
    return GptqLinear(linear, name, files, settings)
