"""`python -m kernelm_jobs`: the service `jobs`."""

import gc

from kernelm_jobs.service import JobsService
from kernelm_sdk.runner import run_service

if __name__ == "__main__":
    gc.freeze()  # what was imported stays: to look through it takes a full collection 45 ms, in the middle of a round
    run_service("jobs", ("jobs/1", "work/1"), JobsService)
