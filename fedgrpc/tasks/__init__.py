"""Tasks: what a worker trains. `torch_task.TorchTask` is the base of one's own, the others are ready-made."""
