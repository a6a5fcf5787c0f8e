"""Print the folder of the packaged tasks: ``--include_path "$(python -m mllm_crossget.integrations.lmms_eval)"``."""

from mllm_crossget.integrations.lmms_eval import tasks_dir

if __name__ == "__main__":
    print(tasks_dir())
