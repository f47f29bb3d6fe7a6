"""A model of transformers, 4.57 or 5, of whose linear layers and tables some are low-rank; written by bert_adapter.

The layers that config.json's "low_rank" names with their ranks are two layers each before weights are loaded. Those
that it names under "integers" hold integers of 8 or 4 bits beside scales, in memory and in files; they are not trained.
Those that it names under "narrow" are layers of attention whose heads have fewer dimensions.
"""

import torch
import transformers
from torch import nn

STOCK = "bert"  # the "model_type" of the model that is changed here
TASKS = {
    "Model": transformers.MODEL_MAPPING,
    "ModelForSequenceClassification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "ModelForTokenClassification": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "ModelForQuestionAnswering": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "ModelForMaskedLM": transformers.MODEL_FOR_MASKED_LM_MAPPING,
    "ModelForMultipleChoice": transformers.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
}
StockConfig = transformers.CONFIG_MAPPING[STOCK]


class LowRankConfig(StockConfig):
    """The stock config, under a name that no stock model answers to: one would draw random weights."""

    model_type = f"low_rank_{STOCK}"


class LowRankLinear(nn.Module):
    """right(left(x)), in place of a linear layer; `right` has its bias."""

    def __init__(self, dense, rank):
        super().__init__()
        self.left = nn.Linear(dense.in_features, rank, bias=False)
        self.right = nn.Linear(rank, dense.out_features, bias=dense.bias is not None)
        self.register_buffer("weight", torch.empty(0))  # of a size at which a stock model refuses the file

    def forward(self, x):
        return self.right(self.left(x))


class LowRankEmbedding(nn.Module):
    """right(left(ids)), in place of a table."""

    def __init__(self, table, rank):
        super().__init__()
        self.left = nn.Embedding(table.num_embeddings, rank)
        self.right = nn.Linear(rank, table.embedding_dim, bias=False)
        self.register_buffer("weight", torch.empty(0))  # as above

    def forward(self, ids):
        return self.right(self.left(ids))


class Int8(nn.Module):
    """Integers in place of a layer's weight, with a scale for each output of a linear layer and each row of a table."""

    def __init__(self, layer):
        super().__init__()
        self.looked_up, self.bias = isinstance(layer, nn.Embedding), getattr(layer, "bias", None)
        self.register_buffer("integers", torch.zeros(layer.weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(len(layer.weight), 1))
        self.register_buffer("weight", torch.empty(0))  # as above

    def forward(self, x):
        if self.looked_up:
            return self.integers[x] * self.scale[x]
        return nn.functional.linear(x, self.integers * self.scale, self.bias)


class Int4(nn.Module):
    """Two integers in a byte in place of a layer's weight, with a scale for each 64 of a row."""

    def __init__(self, layer):
        super().__init__()
        self.looked_up, self.bias = isinstance(layer, nn.Embedding), getattr(layer, "bias", None)
        rows, self.count = layer.weight.shape
        self.register_buffer("integers", torch.zeros(rows, -(-self.count // 2), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(rows, -(-self.count // 64), dtype=torch.bfloat16))
        self.register_buffer("weight", torch.empty(0))  # as above

    def forward(self, x):
        both, scale = (self.integers[x], self.scale[x]) if self.looked_up else (self.integers, self.scale)
        steps = torch.stack([both & 15, both >> 4], dim=-1).flatten(-2)[..., : self.count].float() - 8
        weight = steps * scale.float().repeat_interleave(64, dim=-1)[..., : self.count]
        weight = weight.to(self.weight.dtype)
        return weight if self.looked_up else nn.functional.linear(x, weight, self.bias)


class Narrow(nn.Module):
    """A layer of attention whose heads have fewer dimensions: the others, which what is around it has too, are zero."""

    def __init__(self, layer, whole, inputs, outputs, scale, heads):
        super().__init__()
        self.narrow, self.scale, self.heads = layer, scale, heads
        self.kept = inputs // heads if inputs < whole.in_features else None
        self.missing = (whole.out_features - outputs) // heads
        self.register_buffer("weight", torch.empty(0))  # as above

    def forward(self, x):
        if self.kept:
            x = x.unflatten(-1, (self.heads, -1))[..., : self.kept].flatten(-2)
        x = self.narrow(x) * self.scale
        if self.missing:
            x = nn.functional.pad(x.unflatten(-1, (self.heads, -1)), (0, self.missing)).flatten(-2)
        return x


INTEGERS = {"int8": Int8, "int4": Int4}


class LowRank:
    """What is put before a stock class: it makes layers low-rank, and weights integers."""

    config_class = LowRankConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        names = {name.removeprefix(f"{self.base_model_prefix}."): name for name, _ in self.named_modules()}
        ranks, integers, narrow = (config.low_rank.get(name, {}) for name in ("ranks", "integers", "narrow"))
        for layer in {**ranks, **integers, **narrow}:
            if layer not in names:  # those of a head are not where there is no head
                continue
            place, _, child = names[layer].rpartition(".")
            made = whole = self.get_submodule(names[layer])
            if layer in narrow:
                made = nn.Linear(*narrow[layer][:2], bias=whole.bias is not None)
            if layer in ranks:
                made = (LowRankEmbedding if isinstance(made, nn.Embedding) else LowRankLinear)(made, ranks[layer])
            if layer in integers:
                kind = INTEGERS[integers[layer]]
                if layer in ranks:
                    made.left, made.right = kind(made.left), kind(made.right)
                else:
                    made = kind(made)
            if layer in narrow:
                made = Narrow(made, whole, *narrow[layer], heads=config.num_attention_heads)
            setattr(self.get_submodule(place), child, made)
        if self.get_output_embeddings() is not None and config.tie_word_embeddings:
            self.check_table("a decoder that is tied to it")

    def check_table(self, wanted):
        """A ValueError if the table of words is factorised or of integers."""
        if not isinstance(table := self.get_input_embeddings(), nn.Embedding):
            kind = "factorised" if isinstance(table, LowRankEmbedding) else "of integers"
            told = f"{type(self).__name__}: its table of words is {kind}, and cannot have {wanted}"
            raise ValueError(f"{told}; an export with to='transformers-dense' can")

    def resize_token_embeddings(self, *args, **kwargs):
        self.check_table("rows added or taken")
        return super().resize_token_embeddings(*args, **kwargs)


for task, mapping in TASKS.items():  # LowRankModel, LowRankModelForSequenceClassification, ...
    if (stock := mapping.get(StockConfig, None)) is not None:
        globals()[f"LowRank{task}"] = type(f"LowRank{task}", (LowRank, stock), {"__module__": __name__})
