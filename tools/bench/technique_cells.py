"""Models and plans of `tools.bench.techniques`."""

# Batch, steps of the device, steps that others have trained before, images to score, and patterns of the last part
# and the last layer. The large models train so few steps that a score would say nothing.
MODELS: dict[str, tuple[int, int, int, int, str, str]] = {
    "lenet": (64, 240, 120, 1000, '"fc*"', '"fc3.*"'),
    "mobilenetv2": (16, 6, 60, 0, '"features.1[4-8].*", "classifier.*"', '"classifier.*"'),
    "resnet18": (16, 6, 60, 0, '"layer4.*", "fc.*"', '"fc.*"'),
    "cnn-exits": (64, 240, 120, 1000, "", ""),
    "resnet18-exits": (16, 6, 60, 0, "", ""),
    "cnn-adapters": (64, 240, 120, 1000, "", ""),
}
# Group, degree, plan. PART and LAST are the patterns of the model.
CELLS = (
    ("whole", "float32", ""),
    ("width", "0.5", "width = 0.5"),
    ("width", "0.25", "width = 0.25"),
    ("channels by norm", "0.5", 'width = 0.5\nrule = "magnitude"'),
    ("channels by norm", "0.25", 'width = 0.25\nrule = "magnitude"'),
    ("single weights pruned", "50 %", "pruning.ratio = 0.5"),
    ("single weights pruned", "90 %", "pruning.ratio = 0.9"),
    ("clustered", "16", "clustering.clusters = 16"),
    ("quantized", "8 bits", "quantization.weight_bits = 8\nquantization.activation_bits = 8"),
    ("16 bits", "bfloat16", 'arithmetic.format = "bfloat16"'),
    ("16 bits", "bfloat16, stochastic", 'arithmetic = {format = "bfloat16", rounding = "stochastic"}'),
    ("16 bits", "bfloat16, float32 copy", 'arithmetic = {format = "bfloat16", float32_copy = true}'),
    (
        "16 bits",
        "float16, stochastic, scaled",
        'arithmetic = {format = "float16", rounding = "stochastic", dynamic_loss_scale = true}',
    ),
    ("emulated", "float24", 'arithmetic.format = "float24"'),
    ("micro-batches", "2", "memory.micro_batches = 2"),
    ("micro-batches", "8", "memory.micro_batches = 8"),
    ("checkpoints", "", "memory.checkpoint = true"),
    ("no momentum", "", "memory.momentum = false"),
    ("trained layers", "last part", "trained_layers = [PART]"),
    ("trained layers", "last layer", "trained_layers = [LAST]"),
    ("trained layers", "biases", 'trained_layers = ["*.bias", LAST]'),
    (
        "together",
        "bfloat16, 8 micro-batches, no momentum",
        "memory = {micro_batches = 8, momentum = false}\n"
        'arithmetic = {format = "bfloat16", rounding = "stochastic"}',
    ),
    (
        "together",
        "the same, width 0.5",
        "width = 0.5\nmemory = {micro_batches = 8, momentum = false}\n"
        'arithmetic = {format = "bfloat16", rounding = "stochastic"}',
    ),
)
EXITS = (
    ("whole", "float32", ""),
    *(("depth", str(depth), f"depth = {depth}") for depth in (3, 2, 1)),
    ("depth", "2, distillation", "depth = 2\ndistillation = 0.5"),
    ("depth", "2, width 0.5", "width = 0.5\ndepth = 2"),
)
# Models that are not measured in all cells.
OWN_CELLS = {
    "cnn-exits": tuple(cell for cell in EXITS if cell[1] != "3"),
    "resnet18-exits": EXITS,
    "cnn-adapters": (
        ("whole", "float32", ""),
        *(("rank", str(rank), f"rank = {rank}") for rank in (8, 4, 1)),
        ("rank", "4, width 0.5", "width = 0.5\nrank = 4"),
    ),
}
