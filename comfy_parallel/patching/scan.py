"""Find every global of the host that its own code changes at run time, and say what we do about it.

A host that grows a new such global may be unsafe with several slots; `comfy-parallel doctor` and the tests
compare a checkout with the table below. Attributes of single objects are not seen by the scan.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from comfy_parallel.errors import HostMismatch
from comfy_parallel.patching.sources import HostFiles

_MUTATORS = {"append", "add", "insert", "pop", "remove", "clear", "update", "setdefault", "extend", "discard"}
_SKIPPED = {
    "tests",
    "tests-unit",
    "custom_nodes",
    "script_examples",
    "comfy_api_nodes",
    "alembic_db",
    "output",
    "models",
    "blueprints",
    "api_server",
    ".git",
    ".ci",
    ".github",
}

AT_START = "written while the host starts, before there are slots"
PATCHED = "every slot has its own (see the patches)"
IDEMPOTENT = "every writer writes the same value"
LOCKED = "the host guards it with a lock"
PER_THREAD = "every thread has its own entry, and so every slot"
SHARED = "shared on purpose: a memory heuristic or a display setting"

_TABLE: dict[str, dict[str, str]] = {
    AT_START: {
        "app/assets/api/routes.py": "USER_MANAGER _ASSETS_ENABLED",
        "app/database/db.py": "Session _db_lock",
        "app/logger.py": "STARTUP_WARNINGS logs stderr_interceptor stdout_interceptor",
        "comfy/ldm/modules/attention.py": "REGISTERED_ATTENTION_FUNCTIONS",
        "comfy/options.py": "args_parsing",
        "comfy/quant_ops.py": "_GENERIC_UTILS _LAYOUT_REGISTRY",
        "comfy/utils.py": "PROGRESS_BAR_ENABLED PROGRESS_BAR_HOOK",
        "comfy_api/internal/api_registry.py": "registered_versions",
        "comfy_api/latest/_io.py": "DYNAMIC_INPUT_LOOKUP",
        "folder_paths.py": "folder_names_and_paths input_directory output_directory temp_directory user_directory",
        "hook_breaker_ac10a0.py": "SAVED_FUNCTIONS",
        "main.py": "args.enable_manager dumping_traceback",
        "nodes.py": "EXTENSION_WEB_DIRS LOADED_MODULE_DIRS NODE_CLASS_MAPPINGS NODE_DISPLAY_NAME_MAPPINGS",
        "server.py": "PromptServer.instance",
        "utils/mime_types.py": "_initialized",
    },
    PATCHED: {
        "comfy/memory_management.py": "RAM_CACHE_HEADROOM extra_ram_release_callback",
        "comfy/model_management.py": (
            "PINNED_MEMORY STREAMS TOTAL_PINNED_MEMORY current_loaded_models interrupt_processing stream_counters "
            "CROSS_STEP_STATE DIRTY_MMAPS LARGEST_AIMDO_CASTED_WEIGHT LARGEST_CASTED_WEIGHT STREAM_AIMDO_CAST_BUFFERS "
            "STREAM_CAST_BUFFERS"
        ),
        "comfy/model_patcher.py": "comfy.model_management.TOTAL_PINNED_MEMORY",
        "comfy/model_prefetch.py": (
            "ACTIVE_PREFETCH_RING GRAPH_CAPTURE_STREAMS GRAPH_MODULES GRAPH_WARMED_MODULES MALLOC_GRAPH_BREAKS "
            "MALLOC_GRAPH_ROGUES MALLOC_GRAPH_USED PREFETCH_QUEUES PREFETCH_RING_MODULES"
        ),
        "comfy/ops.py": (
            "comfy.model_management.LARGEST_AIMDO_CASTED_WEIGHT MixedPrecisionOps._compute_dtype "
            "MixedPrecisionOps._layer_quant_config"
        ),
        "comfy/pinned_memory.py": "comfy.model_management.TOTAL_PINNED_MEMORY",
        "comfy_execution/graph_utils.py": (
            "GraphBuilder._default_prefix_graph_index cls._default_prefix_call_index cls._default_prefix_graph_index "
            "cls._default_prefix_root"
        ),
        "comfy_execution/progress.py": "global_progress_registry",
        "comfy_extras/nodes_glsl.py": "GLContext._initialized _eglGetPlatformDisplayEXT cls._instance",
        "comfy_extras/nodes_train.py": "comfy.model_management.in_training comfy.model_management.training_fp8_bwd",
        "latent_preview.py": "args.preview_method",
    },
    LOCKED: {
        "comfy_api/internal/async_to_sync.py": "cls._thread_pool cls._thread_pool_initialized",
        "comfy_execution/cache_provider.py": "_providers _providers_snapshot",
    },
    PER_THREAD: {"comfy/model_prefetch.py": "MALLOC_GRAPHS"},
    IDEMPOTENT: {
        "comfy/model_management.py": "LORA_COMPUTE_DTYPES",
        "comfy/text_encoders/gemma4.py": "Variant.tokenizer",
        "comfy/text_encoders/qwen35.py": "Qwen35_.model_type",
        "comfy/text_encoders/qwen3vl.py": "Qwen3VL_.model_type",
        "comfy_api/latest/_io.py": (
            "cls.SCHEMA cls._ACCEPT_ALL_INPUTS cls._API_NODE cls._CATEGORY cls._DEPRECATED cls._DESCRIPTION "
            "cls._DEV_ONLY "
            "cls._EXPERIMENTAL cls._HAS_INTERMEDIATE_OUTPUT cls._INPUT_IS_LIST cls._NOT_IDEMPOTENT cls._OUTPUT_IS_LIST "
            "cls._OUTPUT_NODE cls._OUTPUT_TOOLTIPS cls._RETURN_NAMES cls._RETURN_TYPES"
        ),
        "comfy_execution/caching.py": "NODE_CLASS_CONTAINS_UNIQUE_ID",
        "comfy_extras/nodes_glsl.py": "EGL gl glfw",
        "folder_paths.py": "extension_mimetypes_cache filename_list_cache",
        "server.py": "_deprecated_paths_warned",
    },
    SHARED: {
        "comfy/ldm/seedvr/vae.py": "_NORM_LIMIT",
    },
}

TREATMENTS = {
    (path, name): treatment
    for treatment, files in _TABLE.items()
    for path, names in files.items()
    for name in names.split()
}


def unknown_globals(files: HostFiles) -> list[tuple[str, str, int]]:
    """File, name and line of each global that the host changes at run time and the table does not know.

    Raises:
        HostMismatch: naming a file that is no Python we can read.
    """
    found = [(path, name, line) for path in _sources(files) for name, line in _changed_in(files, path).items()]
    return [row for row in found if row[:2] not in TREATMENTS]


def changed_globals(text: str) -> dict[str, int]:
    """Names of module and class globals that functions of one file rebind or mutate, with a line of each."""
    tree = ast.parse(text)
    scan = _Scan(tree)
    return {name: line for function in _functions(tree) for name, line in scan.changes(function)}


def _changed_in(files: HostFiles, path: str) -> dict[str, int]:
    try:
        return changed_globals(files.read(path) or "")
    except (SyntaxError, ValueError) as error:
        raise HostMismatch(f"{path}: cannot be read: {error}") from error


def is_scanned(path: str) -> bool:
    """Whether a file of the host is one whose globals count: the host's own, and no test."""
    return path.partition("/")[0] not in _SKIPPED


def _sources(files: HostFiles) -> Iterator[str]:
    return filter(is_scanned, files.python_files())


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


class _Scan:
    """The module-level names of one file, and what a function changes of them."""

    def __init__(self, tree: ast.Module) -> None:
        self._globals = set(_assigned(tree.body))
        self._classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"cls"}

    def changes(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, int]]:
        nodes = list(ast.walk(function))
        declared = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        visible = self._globals - {argument.arg for argument in function.args.args} - (stored - declared)
        for node in nodes:
            name = self._changed(node, declared, visible)
            if name is not None:
                yield name, node.lineno  # type: ignore[attr-defined]

    def _changed(self, node: ast.AST, declared: set[str], visible: set[str]) -> str | None:
        match node:
            case ast.Name(id=name, ctx=ast.Store()) if name in declared:
                return name
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=verb)) if (
                verb in _MUTATORS and name in visible
            ):
                return name
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()) if name in visible:
                return name
            case ast.Attribute(value=ast.Name(id=owner), attr=name, ctx=ast.Store()) if owner in self._classes | {
                "args"
            }:
                return f"{owner}.{name}"
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="comfy" | "torch")), ctx=ast.Store()):
                return ast.unparse(node)
        return None


def _assigned(body: list[ast.stmt]) -> Iterator[str]:
    for statement in body:
        nodes = ast.walk(statement) if isinstance(statement, ast.If | ast.Try) else [statement]
        for node in nodes:
            if isinstance(node, ast.Assign):
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id
