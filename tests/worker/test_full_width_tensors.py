"""What no width makes narrower is worth a warning only where a width is asked for."""

import pytest
from structlog.testing import capture_logs

from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, Segment
from fedgrpc.worker.trainer_calls import described
from tests.support.running_worker import AddOneTrainer


class Sliced(AddOneTrainer):
    def channels(self):
        return ChannelMap((ChannelGroup(8),), {"weight": ((Segment(0),),)})

    def full_width_tensors(self):
        return [(["bias"], "view() is not understood")]


@pytest.mark.parametrize(("asked", "warnings"), [(False, []), (True, ["bias"])])
def test_tensors_kept_whole_are_a_warning_only_where_a_width_is_asked_for(asked, warnings):
    with capture_logs() as lines:
        assert (described(Sliced(), 0, tell_channels=asked).channels is not None) is asked
    told = [line for line in lines if line["log_level"] == "warning" and line["event"].startswith("kept whole")]
    assert [name for line in told for name in line["tensors"]] == warnings
