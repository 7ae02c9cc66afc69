"""Public names for type checkers; `__init__.py` imports each when it is first used."""

from fedgrpc.aggregation.robust.rule import CoordinateRule as CoordinateRule
from fedgrpc.aggregation.robust.rule import DistanceRule as DistanceRule
from fedgrpc.aggregation.server_optimizer import ServerOptimizer as ServerOptimizer
from fedgrpc.algorithms.algorithm import Algorithm as Algorithm
from fedgrpc.api.aggregator import Aggregator as Aggregator
from fedgrpc.api.client import Client as Client
from fedgrpc.api.model import load_model as load_model
from fedgrpc.api.records import Device as Device
from fedgrpc.api.records import ModelVersion as ModelVersion
from fedgrpc.api.records import Round as Round
from fedgrpc.api.records import Run as Run
from fedgrpc.api.records import Task as Task
from fedgrpc.api.rows import Rows as Rows
from fedgrpc.api.simulation import simulate as simulate
from fedgrpc.api.simulation import sweep as sweep
from fedgrpc.api.worker import Worker as Worker
from fedgrpc.codec.encoding import Encoding as Encoding
from fedgrpc.datasets.partition import Partition as Partition
from fedgrpc.errors import FedgrpcError as FedgrpcError
from fedgrpc.rounds.selector import Selector as Selector
from fedgrpc.torch.task import TorchTask as TorchTask
from fedgrpc.tracking.tracker import Tracker as Tracker
from fedgrpc.trainer import EvalResult as EvalResult
from fedgrpc.trainer import Trainer as Trainer
from fedgrpc.trainer import TrainJob as TrainJob
from fedgrpc.trainer import TrainResult as TrainResult

__version__: str
