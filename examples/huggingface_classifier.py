"""A Transformers classifier of texts, padded by batch. Here: a tiny BERT of random weights, and made-up texts.

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task huggingface_classifier
pip install transformers

A real one is AutoModelForSequenceClassification.from_pretrained(NAME), with items that its tokenizer makes.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

from fedgrpc.torch.scores import f1_score
from fedgrpc.torch.task import TorchTask


class Texts(TorchTask):
    batch_size = 16

    def model(self):
        config = BertConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
        return BertForSequenceClassification(config)

    def data(self, path):
        return texts(400, seed=0), texts(100, seed=1)

    def collate(self, items):
        tokens = pad_sequence([item["input_ids"] for item in items], batch_first=True)
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": labels}

    def optimizer(self, parameters, *plan):
        return torch.optim.AdamW(parameters, lr=2e-3)

    def score(self, outputs, targets):
        return {"f1": f1_score(outputs, targets)}


def texts(count, seed):
    """Texts of unequal lengths: does a text of class 1 have more words from the second half of the vocabulary?"""
    draw = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        words = torch.randint(1, 50, (int(torch.randint(5, 30, (1,), generator=draw)),), generator=draw)
        upper = torch.rand(len(words), generator=draw) < (0.8 if index % 2 else 0.2)
        items.append({"input_ids": words + 50 * upper, "labels": index % 2})
    return items
