"""`/v1/jobs` and `/v1/runs` over HTTP: the structs of `jobs/1`, as far as they are the key's tenant's. What a key may do of it
is decided in gate.py."""

from typing import Annotated, Any, get_args

from litestar import Request, get, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from kernelm_contracts.jobs import (
    JobList,
    JobName,
    JobQuery,
    JobRecord,
    Jobs,
    JobSpec,
    JobState,
    RunName,
    RunRecord,
    RunSpec,
    RunView,
)  # fmt: skip
from kernelm_sdk.contract import method_of
from kernelm_sdk.errors import ClientFault

FIND, GET, SUBMIT, CANCEL = map(method_of, (Jobs.find, Jobs.get, Jobs.submit, Jobs.cancel))
GET_RUN, SUBMIT_RUN, CANCEL_RUN = map(method_of, (Jobs.get_run, Jobs.submit_run, Jobs.cancel_run))


@get("/jobs")
async def jobs(request: Request[Any, Any, Any], job_state: Annotated[str, QueryParameter(name="state")] = "",
               run: FromQuery[str] = "", limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100) -> JobList:  # fmt: skip
    """The jobs of the key's tenant, optionally only those in one `state` or of one `run`."""
    if job_state not in ("", *get_args(JobState)):
        raise ClientFault("invalid", f"state: {job_state[:64]!r} is none", f"one of {', '.join(get_args(JobState))}", param="state")
    reply: JobList = await request.app.state.gate.call(request.state.key, FIND, JobQuery(job_state, run, limit))
    return reply


@post("/jobs", status_code=200)
async def submit_job(request: Request[Any, Any, Any], data: JSONBody[JobSpec]) -> JobRecord:
    """Submit a job for the key's tenant."""
    reply: JobRecord = await request.app.state.gate.call(request.state.key, SUBMIT, data)
    return reply


@get("/jobs/{job_id:str}")
async def get_job(request: Request[Any, Any, Any], job_id: FromPath[str]) -> JobRecord:
    """A job of the key's tenant."""
    reply: JobRecord = await request.app.state.gate.call(request.state.key, GET, JobName(job_id))
    return reply


@post("/jobs/{job_id:str}/cancel", status_code=200)
async def cancel_job(request: Request[Any, Any, Any], job_id: FromPath[str]) -> JobRecord:
    """Cancel a job of the key's tenant, with all that it has submitted."""
    reply: JobRecord = await request.app.state.gate.call(request.state.key, CANCEL, JobName(job_id))
    return reply


@post("/runs", status_code=200)
async def submit_run(request: Request[Any, Any, Any], data: JSONBody[RunSpec]) -> RunRecord:
    """Submit a run for the key's tenant."""
    reply: RunRecord = await request.app.state.gate.call(request.state.key, SUBMIT_RUN, data)
    return reply


@get("/runs/{run_id:str}")
async def get_run(request: Request[Any, Any, Any], run_id: FromPath[str]) -> RunView:
    """A run of the key's tenant, with its jobs."""
    reply: RunView = await request.app.state.gate.call(request.state.key, GET_RUN, RunName(run_id))
    return reply


@post("/runs/{run_id:str}/cancel", status_code=200)
async def cancel_run(request: Request[Any, Any, Any], run_id: FromPath[str]) -> RunRecord:
    """Cancel a run of the key's tenant with all of its jobs."""
    reply: RunRecord = await request.app.state.gate.call(request.state.key, CANCEL_RUN, RunName(run_id))
    return reply


HANDLERS = (jobs, submit_job, get_job, cancel_job, submit_run, get_run, cancel_run)
