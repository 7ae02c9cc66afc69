"""LoRA with PEFT: only adapters and the head of a frozen model are trained, at a rank that differs by device.

fedgrpc aggregator --local-models ranks.toml ...
fedgrpc worker --aggregator HOST:PORT --name pi-1 --task peft_lora
pip install transformers peft

In ranks.toml, `[classes.small]` with `rank = 2` has devices of that class train the first 2 of 8 directions.
What is frozen travels to a device with its first model, and in no update.
"""

from huggingface_classifier import Texts as PlainTexts
from peft import LoraConfig, TaskType, get_peft_model


class LoraTexts(PlainTexts):
    def model(self):
        adapters = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
        return get_peft_model(super().model(), adapters)
