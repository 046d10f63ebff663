"""A small web service over the core: recipes come in, run in the background one after another, and are asked about.

    python examples/service.py FOLDER [PORT]        relative paths in a recipe count from FOLDER

    POST /runs                      a recipe in YAML        -> 202 {"id": 1, "state": "waiting", ...}
    GET  /runs, /runs/1             all runs; one           -> {"state": "running", "step": 20, "loss": 3.1, ...}
    GET  /runs/1/text?prompt=...    the finished model continues the prompt

A mistake in a recipe is answered by 400 and the core's own message, `{"error": ...}`; one that is found while it runs
stands in the run's `error`. There is no authentication: a recipe names folders of this machine, so the service listens
on 127.0.0.1 alone. Nothing is global: a process may hold several services, each with its registry and its runs.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from urllib.parse import parse_qs, urlsplit

from nanovllm_core import LLM, Machine, NanoError, Plan, Recipe, Registry, SamplingParams, hookimpl, make_plan, run

LARGEST = 1 << 20  # bytes of a recipe


class Job:
    """One run, and the callback that watches it. Written by the worker alone; readers copy `told`."""

    def __init__(self, number: int, plan: Plan) -> None:
        self.plan = plan
        self.told = {"id": number, "state": "waiting", "output_dir": str(plan.output_dir), "notes": [], "answers": {}}

    def tell(self, **more: object) -> None:
        self.told = {**self.told, **more}

    @hookimpl
    def note(self, text):
        self.tell(notes=[*self.told["notes"], text])

    @hookimpl
    def phase_progress(self, phase, done, total, unit):
        self.tell(phase=phase, done=done, total=total, unit=unit)

    @hookimpl
    def step_done(self, step, metrics):
        self.tell(phase="training", done=step, total=metrics["total_steps"], unit="steps", loss=metrics["loss"])

    @hookimpl
    def evaluated(self, step, metrics):
        self.tell(**metrics)

    @hookimpl
    def generated(self, prompt, text):
        self.tell(answers={**self.told["answers"], prompt: text})


class Service(ThreadingHTTPServer):
    """Listens on `server_port` (0: any free one) once `serve_forever` is called; `close` ends it after the current run."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, registry: Registry | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.registry, self.machine = folder, registry or Registry.from_environment(), Machine.detect()
        self.jobs: list[Job] = []
        self.lock = threading.Lock()  # of `jobs`
        self.queue: Queue[Job | None] = Queue()
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def submit(self, text: str) -> Job:
        """A recipe's run, waiting. Raises NanoError for one that cannot be planned."""
        plan = make_plan(Recipe.from_text(text, base=self.folder), self.registry, self.machine)
        with self.lock:
            job = Job(len(self.jobs) + 1, plan)
            self.jobs.append(job)
        self.queue.put(job)
        return job

    def text(self, job: Job, prompt: str) -> str:
        """What the job's finished model says. Raises NanoError when the prompt, or the folder, cannot be used."""
        llm = LLM(job.plan.output_dir, registry=self.registry, machine=self.machine)
        return llm.generate([prompt], SamplingParams(temperature=0, max_tokens=64))[0]["text"]

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.queue.put(None)
        self.worker.join()

    def _work(self) -> None:
        while (job := self.queue.get()) is not None:
            job.tell(state="running")
            try:
                run(job.plan, callbacks=[job])
                job.tell(state="finished")
            except NanoError as e:
                job.tell(state="failed", error=str(e))
            except BaseException as e:  # a bug, ours or a plugin's: this run is over, the next one is not
                traceback.print_exc()
                job.tell(state="failed", error=f"{type(e).__name__}: {e}")


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        if urlsplit(self.path).path != "/runs":
            return self._answer(404, {"error": f"POST {self.path}: only /runs takes recipes"})
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            return self._answer(400, {"error": f"Content-Length: got {length!r}, allowed: up to {LARGEST}"})
        try:
            return self._answer(202, self.server.submit(self.rfile.read(int(length)).decode("utf-8")).told)
        except (NanoError, UnicodeDecodeError) as e:
            return self._answer(400, {"error": str(e)})

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        parts, jobs = url.path.strip("/").split("/"), self.server.jobs
        if parts == ["runs"]:
            return self._answer(200, [job.told for job in jobs])
        known = parts[0] == "runs" and len(parts) in (2, 3) and parts[2:] in ([], ["text"])
        if not known or not parts[1].isdecimal() or not 1 <= int(parts[1]) <= len(jobs):
            return self._answer(404, {"error": f"GET {self.path}: there is /runs, /runs/N and /runs/N/text?prompt=..."})
        job = jobs[int(parts[1]) - 1]
        if len(parts) == 2:
            return self._answer(200, job.told)
        if job.told["state"] != "finished":
            return self._answer(409, {"error": f"run {parts[1]} is {job.told['state']}: it has no model to ask yet"})
        try:
            return self._answer(200, {"text": self.server.text(job, parse_qs(url.query).get("prompt", [""])[0])})
        except NanoError as e:
            return self._answer(400, {"error": str(e)})

    def _answer(self, code: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""


if __name__ == "__main__":
    service = Service(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
    print(f"http://127.0.0.1:{service.server_port}/runs", flush=True)
    service.serve_forever()
