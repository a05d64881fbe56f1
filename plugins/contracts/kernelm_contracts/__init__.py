"""The contracts of kernelm's subsystems: structs and signatures only. Importing this package registers them all."""

from kernelm_contracts import data, jobs, optimizer, retriever, scheduler, server, trainer

__all__ = ["data", "jobs", "optimizer", "retriever", "scheduler", "server", "trainer"]
