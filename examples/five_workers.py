"""Five workers and an aggregator in one program: `python five_workers.py`."""

from bring_your_own_numpy import SoftmaxRegression

from fedgrpc import Aggregator, Worker


def main():
    with Aggregator(rounds=3, min_workers=5, epochs=2, learning_rate=0.3) as aggregator:
        for number in range(1, 6):
            Worker(aggregator, SoftmaxRegression, name=f"pi-{number}").start()
        aggregator.until_ended()
        for round_ in aggregator.client.rounds():
            print(f"round {round_.number}: {round_.updates} updates", dict(round_.metrics))
        return aggregator.model()


if __name__ == "__main__":
    main()
