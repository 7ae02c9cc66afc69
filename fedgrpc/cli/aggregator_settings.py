"""Settings of `fedgrpc aggregator`: a declaration for each flag, variable and key of a settings file.

The rule: types and defaults are those of the dataclass fields that they set. `fedgrpc.cli.aggregator` uses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.cli.beside import PAGE_SETTINGS
from fedgrpc.cli.connection import FILE, tls_settings
from fedgrpc.cli.options import Declare, Setting
from fedgrpc.cli.process import LOGS
from fedgrpc.cli.values import DURATION, ROUNDS, SIZE, NamedValues
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.training_plan import TrainingPlan

_place = Declare("Where", AggregatorSettings)
_model = Declare("The model", AggregatorSettings)
_policy = Declare("Rounds", RoundPolicy)
_choosing = Declare("Rounds", SelectionPolicy)
_end = Declare("When the run ends", AggregatorSettings)
_plan = Declare("Training plan (without: the learning task's own values)", TrainingPlan)
_mean = Declare("Averaging", AggregatorSettings)
_privacy = Declare("Privacy (docs/guide/privacy.md)", PrivacyPolicy)
_secure = Declare("Privacy (docs/guide/privacy.md)", SecurePolicy)
_transfer = Declare("Transfer", AggregatorSettings)
_service = Declare("Service", AggregatorSettings)
_upstream = Declare("Parent aggregator (docs/tree.md)")
_tls = Declare("TLS", AggregatorSettings)
_share = Declare("Which workers", AggregatorSettings)
_RECIPE = AggregatorSettings.upload_recipe
_ONE_WAY: dict[str, Any] = {"default": None, "metavar": "RECIPES", "show_default": "as --encoding"}

SETTINGS: list[Setting] = [
    _place(
        "--data-dir",
        "Folder of rounds, updates and models; a restart continues from it.",
        type=click.Path(path_type=Path, file_okay=False),
        required=True,
    ),
    _place("--address", "Address to listen on; 0.0.0.0:50051 listens on every network.", metavar="HOST:PORT"),
    _place("--run-name", "Name of the run.", metavar="NAME"),
    _place(
        "--port-file",
        "Write the port to this file once the aggregator serves workers; for an address with port 0.",
        type=click.Path(path_type=Path, dir_okay=False),
    ),
    _place(
        "--track",
        "Send each round's figures to jsonl:FILE, tensorboard:FOLDER, mlflow:FILE, wandb:PROJECT or a class "
        "of your own (docs/guide/tracking.md); repeat for each.",
        multiple=True,
        default=(),
        metavar="TRACKER",
    ),
    _place("--metrics-address", "Serve Prometheus metrics on this address.", metavar="HOST:PORT"),
    *PAGE_SETTINGS,
    _model("--task", "Learning task for workers started without one.", name="learning_task", metavar="REF"),
    _model("--model", "Model name for workers started without one.", metavar="NAME"),
    _model("--initial-model", "Safetensors file to start from; without: a worker's untrained model.", type=FILE),
    _model("--max-model", "Largest initial model to accept from a worker.", name="max_model_bytes", type=SIZE),
    _model(
        "--initialiser",
        "Workers of this name (with * and ?) give the initial model; repeat for each. Without: the first worker.",
        name="initialisers",
        multiple=True,
        default=(),
        metavar="NAME",
    ),
    _model(
        "--task-option",
        "Option of the learning task, for workers that have none of that name; repeat for each.",
        name="task_options",
        type=NamedValues(),
        multiple=True,
        default=(),
        metavar="NAME=VALUE",
    ),
    _share(
        "--requires",
        "Devices that may serve the run, as in 'memory >= 2GB' (docs/guide/operate.md); without: all.",
        metavar="EXPRESSION",
    ),
    _share("--priority", "Of two runs that want a worker, the one with the higher number gets it."),
    _share("--quota", "Most workers of the run at the same time; without: no limit."),
    _policy("--min-workers", "Open a round once this many workers are idle."),
    _policy(
        "--min-new-examples",
        "Train only on workers with this many new examples; a worker that cannot count them takes part, too.",
        show_default="1 with --rounds none, else 0",
    ),
    _policy("--min-sample-size", "Aim at this many updates or more."),
    _policy("--max-participants", "Aim at this many updates or fewer."),
    _policy("--fraction", "Share of the live workers to aim at."),
    _policy("--over-selection", "Ask this many times as many workers as the round aims at."),
    _policy("--quorum", "At the deadline, commit with at least this many updates."),
    _policy(
        "--weight-aim", "Commit early once a quorum of updates has this total weight (examples, or --weight)."
    ),
    _policy("--deadline", "Time that workers have to report in a round.", name="deadline_s", type=DURATION),
    _choosing(
        "--learn-deadline/--no-learn-deadline",
        "Shorten the deadline to the time that the wanted updates need, predicted from each worker's past times.",
    ),
    _policy("--deadline-floor", "Shortest learned deadline.", name="deadline_floor_s", type=DURATION),
    _choosing("--deadline-quantile", "Predict each worker by this quantile of its past times."),
    _choosing("--deadline-margin", "Multiply the predicted time by this."),
    _choosing(
        "--selection",
        "Select workers at random (uniform), by usefulness and speed (oort), or by a plugin "
        "(docs/guide/extend.md).",
        metavar="SELECTION",
    ),
    _choosing("--fairness", "Oort: share of a round for the workers that have waited longest."),
    _choosing(
        "--exploration",
        "Oort: share of the first round for workers without a task so far; it falls from round to round.",
    ),
    _policy("--late", "Discard late updates, or carry them into the next round, where they count less."),
    _policy(
        "--max-staleness",
        "Carry a late update until this many versions have been committed since its base version.",
    ),
    _policy(
        "--buffer-size",
        "With --late carry: commit a version for every so many updates, whatever their age (FedBuff).",
    ),
    _policy(
        "--reconnect-grace",
        "Keep the open round open for at least this long after a restart of the aggregator.",
        name="reconnect_grace_s",
        type=DURATION,
    ),
    _policy("--lease", "A worker that is silent for this long loses its task.", name="lease_s", type=DURATION),
    _policy(
        "--selection-window",
        "Wait this long for the other live workers before a round starts.",
        name="selection_window_s",
        type=DURATION,
    ),
    _policy(
        "--selection-timeout",
        "Abandon a round that finds too few workers for this long; without: keep waiting.",
        name="selection_timeout_s",
        type=DURATION,
    ),
    _end(
        "--rounds",
        "Finish after this many committed rounds; none: never, and rounds wait for new examples on devices.",
        type=ROUNDS,
    ),
    _end(
        "--target-metric",
        "Finish early at this score, as in accuracy>=0.95.",
        name="target",
        type=str,
        metavar="METRIC>=VALUE",
    ),
    _end(
        "--patience",
        "Finish early once so many versions in a row are scored and none is better than the best.",
        type=int,
        default=None,
        metavar="VERSIONS",
    ),
    _end("--stay/--no-stay", "Keep serving the model after the run has ended."),
    _plan("--epochs", "Passes over the local data; fractions are allowed."),
    _plan("--max-steps", "At most this many optimizer steps."),
    _plan("--batch-size", "Examples in a batch."),
    _plan("--learning-rate", "Step size of the workers' optimizer."),
    _plan("--momentum", "Momentum of the workers' optimizer."),
    _plan("--weight-decay", "Weight decay of the workers' optimizer (L2 penalty); 0: none."),
    _plan(
        "--algorithm",
        "Federated algorithm with its options, as in fedprox:mu=0.1 or scaffold:workers=10, or your own class "
        "as package.module:Class (docs/guide/algorithms.md); without: FedAvg.",
        metavar="NAME[:OPTIONS]",
    ),
    _plan(
        "--label-adjustment",
        "Add this many times the log of each label's share on a worker to its training logits; 0: do not "
        "(docs/heterogeneity.md).",
    ),
    _plan(
        "--upload-reserve",
        "Stop training when this much of the deadline (or the usual time of the worker's uploads) is left; "
        "without: train to the end.",
        name="upload_reserve_s",
        type=DURATION,
    ),
    _plan(
        "--local-models",
        "TOML file of local-model plans by device class (docs/heterogeneity.md).",
        type=FILE,
        metavar="FILE",
    ),
    _mean(
        "--weight",
        "Weight of a worker in the mean in place of its example count; repeat for each.",
        name="worker_weights",
        type=NamedValues(number=True),
        multiple=True,
        default=(),
        metavar="WORKER=P",
    ),
    _mean(
        "--noise-weights/--plain-weights",
        "An update weighs the less, the more noise its worker has measured of its number format.",
    ),
    _mean(
        "--staleness-exponent",
        "An update that is N versions late is weighted by (1 + N) to the power of minus this.",
    ),
    _mean(
        "--server-optimizer",
        "Server optimizer that applies the mean update: fedavg, fedavgm, fedadagrad, fedyogi, fedadam, with "
        "options as in fedadam:beta1=0.8, or a plugin (docs/guide/extend.md).",
        metavar="OPTIMIZER",
    ),
    _mean("--server-learning-rate", "Step size of the server optimizer; without: its usual one."),
    _mean("--max-update-norm", "Reject updates with a larger L2 norm."),
    _mean(
        "--aggregation",
        "Rule in place of the mean: median, trimmed-mean:0.2, geometric-median, krum:f=2, multi-krum:f=2, "
        "centered-clip, nnm+ before another, or a class as package.module:Class (docs/guide/robust.md).",
        metavar="RULE",
    ),
    _mean(
        "--clip-quantile",
        "Scale updates down to this quantile of the round's L2 norms, as in 0.5; with --privacy to one that is "
        "estimated over rounds, from --clip-norm on.",
    ),
    _mean("--clip-norm", "Scale updates down to this L2 norm (of the difference to their base version)."),
    _mean("--max-examples", "Most examples that an update counts for, whatever it claims."),
    _policy(
        "--max-share",
        "Largest share of one worker in a mean, as in 0.2; fewer than 1 / SHARE updates weigh the same.",
    ),
    _mean(
        "--evaluator",
        "Workers of this name (with * and ?) may be evaluators; repeat for each. Without: any worker may, "
        "but its scores end no run.",
        name="evaluators",
        multiple=True,
        default=(),
        metavar="NAME",
    ),
    _mean(
        "--leaf",
        "Workers of this name (with * and ?) may be leaves, whose means count for all their workers; "
        "repeat for each. Without: any worker may, but its mean weighs no more than one update.",
        name="leaves",
        multiple=True,
        default=(),
        metavar="NAME",
    ),
    _mean("--evaluate/--no-evaluate", "Let workers score each model on their held-out data before training."),
    _mean("--seed", "Seed of selection, shuffling and stochastic rounding."),
    _privacy(
        "--privacy",
        "Release versions with noise: independent (gaussian), of a tree over all rounds (dp-ftrl), or of a band "
        "of rounds (dp-mf).",
        name="mechanism",
    ),
    _privacy("--noise-multiplier", "Standard deviation of the noise over the most that one device adds."),
    _privacy("--target-epsilon", "Compute the noise so that all rounds cost at most this; the run ends before."),
    _privacy("--delta", "Tell epsilon at this delta; keep it well below one over the number of devices."),
    _privacy(
        "--privacy-cohort",
        "Divide the sum of updates by this count of devices, however many came.",
        name="cohort",
    ),
    _privacy(
        "--min-separation",
        "A device takes part at most once in any so many versions that follow each other.",
    ),
    _policy(
        "--poisson-rate",
        "Ask each idle device with this chance (with --quorum 0); noise counts for more where nobody knows whom.",
    ),
    _privacy(
        "--metrics/--no-metrics",
        "Devices report no losses, scores and counts of examples, and of a failure its kind alone.",
    ),
    _secure(
        "--secure-aggregation",
        "See only the sum of a round's updates: devices mask them, with values of this many bits, as in 8; with "
        "--leaf each leaf has the sum of its own workers (docs/secure_aggregation.md).",
        name="secure_bits",
        metavar="BITS",
    ),
    _secure(
        "--secure-weight-bits",
        "With --max-examples: an update weighs its examples, in so many bits; 0: all weigh the same.",
    ),
    _secure(
        "--secure-neighbours",
        "Neighbours that a device shares masks with, an even number: fewer cost less, and bear fewer losses. "
        "0: all others up to 100 devices.",
    ),
    _secure(
        "--secure-coordinates",
        "Share of each large tensor that a round's updates have, drawn anew each round, the same on all devices: "
        "with 0.25 a quarter of the bytes.",
    ),
    _secure(
        "--secure-colluding",
        "So many neighbours of a device may work with the aggregator and learn nothing more; more must answer.",
    ),
    _transfer(
        "--encoding",
        "Recipe of models and updates, as in raw or int8+zstd; or by link, 'raw above 1gbit | int8+zstd'; or auto "
        "(docs/transport.md).",
        default=_RECIPE,
        metavar="RECIPES",
    ),
    _transfer("--upload-encoding", "Recipe of updates.", name="upload_recipe", **_ONE_WAY),
    _transfer("--download-encoding", "Recipe of models.", name="download_recipe", **_ONE_WAY),
    _transfer(
        "--difference-encoding",
        "Recipe of the difference to the model that a worker holds, where a lossy one is possible.",
        name="difference_recipe",
        metavar="RECIPES",
        show_default="as models",
    ),
    _transfer("--max-chunk", "Largest chunk of a stream.", name="max_chunk_bytes", type=SIZE),
    _transfer("--max-payload", "Largest update to accept.", name="max_payload_bytes", type=SIZE),
    _transfer("--max-uploads", "Upload slots: most uploads at the same time."),
    _transfer(
        "--max-upload-memory",
        "Memory for uploads on their way to the disk; side streams of far ones take up to twice as much, too.",
        name="max_upload_memory_bytes",
        type=SIZE,
    ),
    _transfer("--durable/--no-durable", "Acknowledge an update only once it is on the disk."),
    _service("--max-workers", "Most registered workers."),
    _service("--keep-versions", "Model versions to keep on the disk."),
    _service("--keep-rounds", "Records of past rounds to keep; a round of 1,000 tasks takes about 180 kB."),
    _service("--poll-wait", "Longest wait of a worker's poll.", name="poll_wait_s", type=DURATION),
    _service(
        "--heartbeat-interval",
        "How often a busy worker reports; without: a third of the lease, 5 s at most.",
        name="heartbeat_interval_s",
        type=DURATION,
    ),
    _service(
        "--ingest",
        "Processes that share the port and take TLS and gRPC from the run's own; 0: none (docs/guide/operate.md).",
    ),
    _service("--drain", "How long SIGTERM waits for calls in flight.", name="drain_s", type=DURATION),
    _service(
        "--witness",
        "Serve only while this address can be reached; for a volume that may move to another node (k8s).",
        name="witness",
        type=str,
        default=None,
        metavar="HOST:PORT",
    ),
    _service(
        "--witness-after",
        "End when the witness could not be reached for this long.",
        name="witness_after_s",
        type=DURATION,
        default=60.0,
    ),
    _upstream("--upstream", "Parent aggregator: this one works for it as a leaf.", metavar="HOST:PORT"),
    _upstream("--upstream-name", "Name in the parent's fleet; without: this machine's host name.", metavar="NAME"),
    _upstream(
        "--upstream-join",
        "Join token of the parent, once; or a file with it, or - for standard input.",
        metavar="TOKEN",
    ),
    _upstream("--upstream-tls", "Use TLS with the system's certificates.", is_flag=True, default=False),
    _upstream("--upstream-tls-ca", "Certificates to trust (PEM); turns TLS on.", type=FILE),
    _upstream("--upstream-tls-cert", "Certificate of this leaf (PEM), where the parent asks for one.", type=FILE),
    _upstream("--upstream-tls-key", "Key of that certificate (PEM).", type=FILE),
    *tls_settings("Certificate to serve with (PEM).", "Require clients' certificates signed by these (PEM)."),
    _tls(
        "--insecure",
        "Let anybody call: without TLS outside of this machine, or with --tls-cert alone.",
        is_flag=True,
    ),
    _tls(
        "--certificate-life",
        "How long a device's certificate counts; devices renew theirs after two thirds.",
        name="certificate_life_s",
        type=DURATION,
    ),
    _tls(
        "--renewal-grace",
        "For how long after that a device that was off may still renew; later it joins with a new token.",
        name="renewal_grace_s",
        type=DURATION,
    ),
    *LOGS,
]


# Settings of the process, whatever runs it has.
PROCESS_NAMES: Final = frozenset(
    {
        *("data_dir", "address", "run_name", "port_file", "metrics_address", "web_address", "stay", "config"),
        *("max_chunk_bytes", "max_payload_bytes", "max_uploads", "max_upload_memory_bytes", "durable"),
        *("max_workers", "poll_wait_s", "heartbeat_interval_s", "drain_s", "lease_s", "ingest"),
        *("insecure", "certificate_life_s", "renewal_grace_s", "tls_cert", "tls_key", "tls_ca"),
        *("upstream", "upstream_name", "upstream_join", "upstream_tls", "upstream_tls_ca"),
        *("upstream_tls_cert", "upstream_tls_key", "log_level", "log_format"),
        *("track", "web_hosts", "witness", "witness_after_s"),
    }
)
