"""What a result file says of the machine: kind and versions, not its name."""

from pecker_fast.hardware import environment


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(environment())


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()
