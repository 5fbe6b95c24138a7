@echo off
rem Starts and updates ComfyUI by gpu_config.json. It lies in ComfyUI's folder, or where comfy_parallel does.
rem Usage: launch_distributed.bat [master ^| all-fast ^| all-slow ^| venv ^| update ^| update-nodes] [OPTION]...
setlocal

set "HERE=%~dp0"
if exist "%HERE%main.py" (set "COMFYUI=%HERE%") else (set "COMFYUI=%HERE%..\..\")
if defined COMFYUI_PATH set "COMFYUI=%COMFYUI_PATH%\"
if not exist "%COMFYUI%main.py" (
    echo ComfyUI was not found: put this file into its folder, or set COMFYUI_PATH to that folder.
    exit /b 2
)
set "COMFYUI_PATH=%COMFYUI:~0,-1%"

set "PYTHON=python"
if exist "%COMFYUI%..\python_embeded\python.exe" set "PYTHON=%COMFYUI%..\python_embeded\python.exe"
if exist "%COMFYUI%.venv\Scripts\python.exe" set "PYTHON=%COMFYUI%.venv\Scripts\python.exe"
if exist "%COMFYUI%venv\Scripts\python.exe" set "PYTHON=%COMFYUI%venv\Scripts\python.exe"
if not defined COMFYUI_PYTHON set "COMFYUI_PYTHON=%PYTHON%"

set "PACKAGE=%COMFYUI%custom_nodes\comfy_parallel"
if exist "%HERE%comfy_parallel\__main__.py" set "PACKAGE=%HERE%"

set "MODE=%~1"
if not "%MODE%"=="" goto run
echo   master        start the master
echo   all-fast      start all, one every two seconds
echo   all-slow      start all, each when the one before is ready
echo   venv          open a prompt with ComfyUI's Python
echo   update        update ComfyUI
echo   update-nodes  update all custom nodes
set /p "MODE=Which? "
if "%MODE%"=="" exit /b 2
"%COMFYUI_PYTHON%" "%PACKAGE%\run_command.py" %MODE%
exit /b %ERRORLEVEL%

:run
"%COMFYUI_PYTHON%" "%PACKAGE%\run_command.py" %*
exit /b %ERRORLEVEL%
