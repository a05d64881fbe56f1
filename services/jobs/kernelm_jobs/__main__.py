"""`python -m kernelm_jobs`: the service `jobs`."""

from kernelm_jobs.service import JobsService
from kernelm_sdk.runner import run_service

if __name__ == "__main__":
    run_service("jobs", ("jobs/1", "work/1"), JobsService)
