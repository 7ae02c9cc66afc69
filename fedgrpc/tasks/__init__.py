"""Ready-made learning tasks; `fedgrpc.torch.task.TorchTask` is the base of one's own."""
