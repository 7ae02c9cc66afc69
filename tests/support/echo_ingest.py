"""An ingest process whose work is to send each message back and to count them: `python -m` is one."""

from fedgrpc.errors import RoundClosed
from fedgrpc.rpc.ingest_process import be_ingest_process


async def do(order, caller):
    if order == b"fail":
        raise RoundClosed("no work today")
    count = 0
    while (message := await caller.read()) is not None:
        count += 1
        caller.tell(count)
        await caller.write(message)
    return order + str(count).encode()


if __name__ == "__main__":
    be_ingest_process(lambda start: do)
