"""What is wrong with a trace is said with its file, line and field; the command ends with a status, and without a traceback."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernelm_cli.app import execute
from kernelm_sdk.errors import ClientFault
from kernelm_simulator.profiles import Machine
from kernelm_simulator.trace import read

PHILLY = "timestamp,duration,num_gpus,gpu_time,cluster\n"
HELIOS = "job_id,user,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration,queue,vc\n"
SIA = "name,time,application,num_replicas,batch_size\n"
PAI = "job_name,task_name,inst_num,status,start_time,end_time,plan_cpu,plan_mem,plan_gpu,gpu_type\n"
TIME = "2017-10-09 07:02:55"


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """The csv module's own limit, which is the process's: who reads documents in it may have set a larger one."""
    before = csv.field_size_limit(131_072)
    yield
    csv.field_size_limit(before)


@pytest.mark.parametrize(("text", "said"), [
    (PHILLY + f"{TIME},soon,2,0,x\n", "line 2: duration: 'soon' is no number"),
    (PHILLY + f"{TIME},60,2,0,x\n{TIME},-60,2,0,x\n", "line 3: duration: -60 is not finite, or negative"),
    (PHILLY + f"{TIME},nan,2,0,x\n", "line 2: duration: nan is not finite, or negative"),
    (PHILLY + f"{TIME},60,1.5,0,x\n", "line 2: num_gpus: 1.5 is no whole number from 0 on"),
    (PHILLY + f"{TIME},60\n", "line 2: num_gpus: is missing"),
    (PHILLY + f"{TIME},60,1,0,x,y,z\n", "line 2: 2 more fields than columns"),
    (PHILLY + "yesterday,60,1,0,x\n", "line 2: timestamp: 'yesterday' is no number"),
    (PHILLY + "2017-13-09 07:02:55,60,1,0,x\n", "line 2: timestamp: '2017-13-09 07:02:55' is no time"),
    (PHILLY + "-5,60,1,0,x\n", "line 2: timestamp: -5 is not finite, or negative"),
    (PHILLY + f"{TIME},60,1,0,\n", "line 2: cluster: is missing"),
    (PHILLY + f"{TIME},60,1,0,{'x' * 200_000}\n", "damaged: field larger than field limit"),
    (HELIOS + f"7,u,8,64,1,MAYBE,{TIME},{TIME},{TIME},60,10,vc\n", "line 2: state: 'MAYBE' is none of BOOT_FAIL"),
    (HELIOS + 2 * f"7,u,8,64,1,FAILED,{TIME},{TIME},{TIME},60,10,vc\n", "line 3: job 7 is that of line 2 again"),
    (PAI + "j,t,1,Terminated,100,50,600,29,50,T4\n", "line 2: end_time: 50 is before start_time, 100"),
    ("j,t,1,Lost,100,150,600,29,50,T4\n", "line 1: status: 'Lost' is none of Failed"),
    (SIA + "a,0,bert,1,128\n", "profiles are needed"),
    ("timestamp,duration,cluster\n", "nearest is one without num_gpus"),
    ("", "columns none"),
    (PHILLY, "holds no job"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ClientFault) as raised:
        read(path)
    assert said in raised.value.message
    assert raised.value.remedy
    assert "trace.csv" in raised.value.message or raised.value.code == "missing_profiles"
    assert len(raised.value.message) < 400
    assert execute(["simulate", "--trace", str(path), "--scheduler", "fifo"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_compressed_trace_is_read_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    text = (PHILLY + "".join(f"{n},{60 + n},1,0,cluster-{n * n}\n" for n in range(500))).encode("utf-8-sig")
    whole, cut, path = gzip.compress(text), tmp_path / "cut.csv.gz", tmp_path / "trace.csv.gz"
    path.write_bytes(whole)
    assert len(read(path)) == 500
    for damaged in (whole[:-40], whole[:100] + bytes(40) + whole[140:], whole[:3], b"\xff\xfe\x00"):
        cut.write_bytes(damaged)
        with pytest.raises(ClientFault, match=r"cut\.csv\.gz"):
            read(cut)
    for nothing in (tmp_path, tmp_path / "no.csv"):
        with pytest.raises(ClientFault, match=r"Is a directory|No such file"):
            read(nothing)


def test_a_part_of_a_trace_begins_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(PHILLY + "".join(f"{1000 + 10 * n},60,1,0,x\n" for n in range(10)))
    assert [job.submitted for job in read(path, from_s=25.0, for_s=30.0)] == [5.0, 15.0, 25.0]
    assert len(read(path, jobs=2, from_s=25.0)) == 2
    with pytest.raises(ClientFault, match="no job was submitted then"):
        read(path, from_s=100.0)
    for wrong in (["--days", "0"], ["--from-day", "-1"], ["--days", "nan"]):
        assert execute(["simulate", "--trace", str(path), "--scheduler", "fifo", *wrong]) == 2


def test_devices_are_rounded_up(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(PAI + "".join(f"j{n},t,2,Terminated,{n},{n + 9},600,29,{gpu},T4\n" for n, gpu in enumerate((25, 100, 250, 0))))
    assert [job.members for job in read(path)] == [2, 2, 6]


def test_a_profile_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "placements-t.csv"
    cases = (("1,64,0.5,x\n", r"placements-t\.csv, line 2: sync_time: 'x' is no number"), ("", "no line beyond its columns"))
    for text, said in cases:
        path.write_text("placement,local_bsz,step_time,sync_time\n" + text)
        with pytest.raises(ClientFault, match=said):
            Machine(tmp_path, "t")
