"""mitogen_single: makes Ansible several times faster. One file, no dependency but Ansible.

Copy it into a callback_plugins directory, beside the playbook or as ansible.cfg says. Playbooks stay as they are.

0 THE MAP

    ansible-playbook
     |-- main thread: the stock strategy, results, callbacks -----------.
     |-- worker threads, one a (task, host), which take turns ----------|   a socket each, handed over at the
     |-- forked workers for what must not share the process ------------|   broker's door
     `-- broker: a process with one event loop, owns every link <-------'
          |-- ssh web1 -- agent lab@web1 --+-- child: a fork of the agent, in which a module runs
          |                                `-- sudo -- agent root@web1 -- child ...
          |-- ssh gate -- agent lab@gate -- ssh db1 -- agent lab@db1 -- child ...
          |-- docker exec c1 -- agent root@c1 -- child ...
          `-- agent of connection: local

An agent is one Python process per (host, connection, account, interpreter). It starts from a text of 13 kB, keeps the
sources of modules in RAM, and runs modules in forks of itself. The life of a task:

 1. The stock strategy starts a worker: ours is a thread that has the baton (§4). Ansible's TaskExecutor asks for a
    connection and gets our Connection: the stock plugin's own instance with a few methods of ours in front (§3, §5).
 2. The action plugin calls _execute_module. Ansible's builder makes the AnsiballZ wrapper, with a table of contents in
    the place of the zip (§6). That is our Payload.
 3. Connection.exec_command sees the Payload and asks the broker, through the worker's Client (§7), to run it in the
    agent of that host and account. Where there is none yet, it is started hop by hop: the stock plugins are asked for
    the command lines and for what the prompts mean (§9), the broker or an agent runs them (§15).
 4. The broker adds the sources which that agent lacks to the same write, and behind them those of a later task (§8). A
    child of the agent imports from RAM and runs the module as __main__ (§16, §18). Its exit code and output are the
    answer.

Invariants. Nothing that comes from a target is unpickled, evaluated or used as a path here. A target cannot address
another target, but for those that are reached by way of it. Passwords travel only as the answer to a prompt. What we
cannot carry, stock Ansible runs: every method of ours falls back to the stock one. The end of stdin ends an agent and
all that it started; the end of ansible-playbook ends the broker.

Where does my line go?

    §  section          what lives there
    1  FACE             version, documentation, tunables
    2  STRATEGY         how Ansible, wherever it finds this file, comes to run plays our way
    3  PATCHES          the table of what we change in Ansible
    4  WORKERS          threads that take turns; what plugins keep; lookups that wait; items ahead; what is done once
    5  CONNECTION       exec_command, put_file, fetch_file, reset; the way by other hosts; temporary directories
    6  PAYLOADS         what Ansible's module builder made: contents and parameters; kept across runs; foreseen
    7  CLIENT           a worker's end of the broker's socket
    8  BROKER           owns the links, connects once, knows which agent has which sources
    9  HOPS             stock plugins' options -> command line + dialogue
    10 SHIPPING         the core: slice, strip, compress; the one-line bootstrap
    11 COMMAND LINE     python3 mitogen_single.py demo | doctor | --version
    ------------------- below the fence: what is sent to targets
    12 WIRE             message table, frames
    13 LOOP             poll, timers, streams
    14 ROUTER           Agent: deliver, forward, reply; errors become replies
    15 CHILDREN         start a process on pipes and a pty; make an agent of it
    16 IMPORTER         modules from RAM
    17 FILES            put, get
    18 RUNNER           run a command; run a module in a forked child
    19 MAIN             what an agent does from its first to its last line
    ------------------- below the last fence: what is sent to those that need it
    20 JOB              what an asynchronous task is

Calls go down, answers come back up. §2-6 know Ansible's objects, §7-10 never import ansible, §12-19 import nothing
but the standard library. §20 is a module among others.
"""
# SPDX-License-Identifier: BSD-3-Clause

# 1 FACE ##############################################################################################################
from __future__ import annotations

import argparse
import ast
import atexit
import base64
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import functools
import gc
import hashlib
import inspect
import io
import itertools
import json
import locale
import marshal
import multiprocessing
import os
import queue
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import zipfile
import zlib
from multiprocessing import connection as multiprocessing_connection, popen_fork
from multiprocessing.reduction import ForkingPickler

try:
    import jinja2
    from ansible import constants as C
    from ansible.config.manager import ConfigManager
    from ansible.errors import (AnsibleAuthenticationFailure, AnsibleConnectionFailure, AnsibleError,
                                AnsibleFileNotFound)
    from ansible.executor import module_common, task_executor
    from ansible.executor.process import worker as worker_process
    from ansible.executor.task_queue_manager import FinalQueue
    from ansible.module_utils.common.text.converters import to_bytes, to_text
    from ansible.module_utils.common.yaml import yaml_load
    from ansible.module_utils.parsing.convert_bool import boolean
    from ansible.playbook.base import FieldAttributeBase
    from ansible.playbook.block import Block
    from ansible.playbook.conditional import Conditional
    from ansible.playbook.play_context import PlayContext
    from ansible.playbook.role_include import IncludeRole
    from ansible.plugins import action as action_plugins
    from ansible.plugins import strategy as strategy_plugins
    from ansible.plugins.action import copy as copy_action, fetch as fetch_action
    from ansible.plugins.callback import CallbackBase
    from ansible.plugins.connection import ConnectionBase, local as local_plugin
    from ansible.plugins.connection import ssh as ssh_plugin
    from ansible.plugins.loader import (PluginLoader, action_loader, become_loader, connection_loader, lookup_loader,
                                        module_loader, module_utils_loader, shell_loader, strategy_loader)
    from ansible.plugins.lookup import LookupBase
    from ansible.plugins.strategy import StrategyBase
    from ansible.plugins.vars import BaseVarsPlugin
    from ansible.template import Templar
    from ansible.utils import vars as utils_vars
    from ansible.utils.collection_loader import _collection_finder
    from ansible.utils.display import Display
    from ansible.utils.multiprocessing import context as multiprocessing_context
    from ansible.utils.sentinel import Sentinel
    display = Display()
except ImportError:
    if __name__ != '__main__':
        raise
    # A script on a machine without Ansible: only §11 works.
    CallbackBase = ConnectionBase = StrategyBase = BaseVarsPlugin = object

__version__ = '0.1.0'

DOCUMENTATION = """
    name: mitogen_single
    type: notification
    short_description: Runs tasks several times faster
    description:
        - Modules run in a persistent Python process per host and account, reached over one SSH connection and one
          become, which keeps their sources in memory.
        - The order in which hosts and tasks take turns is that of Ansible's own strategies.
        - In a directory of callback or vars plugins the file serves every play. Among strategy plugins it serves the
          plays that name it, be it C(mitogen_single), C(mitogen_single_free), C(mitogen_linear) or what else it is
          called there.
        - Connections that it cannot carry are left to the stock plugins.
    notes:
        - Of Mitogen's variables C(mitogen_via), C(mitogen_task_isolation), C(mitogen_ssh_compression),
          C(mitogen_ssh_keepalive_interval) and C(mitogen_ssh_keepalive_count) are honoured. C(mitogen_mask_remote_name)
          has nothing to ask for, since nothing on a target bears the name of the controller. In the place of
          C(mitogen_docker_path), C(mitogen_lxc_path) and so on there are the connection plugin's own options, in that
          of C(mitogen_ssh_debug_level) C(ssh_extra_args).
    author: the mitogen_single authors
    version_added: historical
    options:
        enabled:
            description: V(false) leaves everything, or the hosts and tasks that have the variable, to stock Ansible.
            type: bool
            default: true
            env: [{name: MITOGEN_SINGLE_ENABLED}]
            ini: [{section: mitogen_single, key: enabled}]
            vars: [{name: mitogen_single_enabled}]
        strategy:
            description:
                - The strategy of Ansible's own that a play with C(strategy=mitogen_single) follows. A file whose name
                  ends in the name of one follows that one.
            choices: [linear, free, host_pinned, debug]
            default: linear
            env: [{name: MITOGEN_SINGLE_STRATEGY}]
            ini: [{section: mitogen_single, key: strategy}]
            vars: [{name: mitogen_single_strategy}]
        workers:
            description:
                - V(auto) runs each task in a thread where that is known to be safe, and in a forked process where it is
                  not; V(fork) forks always, as stock Ansible does.
            choices: [auto, fork]
            default: auto
            env: [{name: MITOGEN_SINGLE_WORKERS}]
            ini: [{section: mitogen_single, key: workers}]
        boot_timeout:
            description:
                - Seconds that a remote login or a become may be silent before the task fails,
                  where the connection's own O(ignore:timeout) is shorter.
            type: int
            default: 60
            env: [{name: MITOGEN_SINGLE_BOOT_TIMEOUT}]
            ini: [{section: mitogen_single, key: boot_timeout}]
            vars: [{name: mitogen_single_boot_timeout}]
        max_agents:
            description:
                - Processes that are kept below one login, one for each account and interpreter. When one more is
                  wanted, that which was not used for longest goes, and comes again when a task needs it.
                - Those at work stay, so there are more where more tasks run at once.
            type: int
            default: 20
            env: [{name: MITOGEN_SINGLE_MAX_AGENTS}]
            ini: [{section: mitogen_single, key: max_agents}]
            vars: [{name: mitogen_single_max_agents}]
        ssh_compression:
            description: Whether ssh compresses. Without it, what O(ignore:ssh_args) says holds.
            type: bool
            env: [{name: MITOGEN_SINGLE_SSH_COMPRESSION}]
            ini: [{section: mitogen_single, key: ssh_compression}]
            vars: [{name: mitogen_single_ssh_compression}, {name: mitogen_ssh_compression}]
        ssh_keepalive_interval:
            description: Seconds of silence after which ssh asks whether the host is still there.
            type: int
            env: [{name: MITOGEN_SINGLE_SSH_KEEPALIVE_INTERVAL}]
            ini: [{section: mitogen_single, key: ssh_keepalive_interval}]
            vars: [{name: mitogen_single_ssh_keepalive_interval}, {name: mitogen_ssh_keepalive_interval}]
        ssh_keepalive_count:
            description: How often in a row it asks before it gives up.
            type: int
            env: [{name: MITOGEN_SINGLE_SSH_KEEPALIVE_COUNT}]
            ini: [{section: mitogen_single, key: ssh_keepalive_count}]
            vars: [{name: mitogen_single_ssh_keepalive_count}, {name: mitogen_ssh_keepalive_count}]
        task_isolation:
            description:
                - Modules run in forks of the agent. V(none) lets those of Ansible's own that were reviewed for it, such
                  as M(ansible.builtin.command) and M(ansible.builtin.copy), follow each other in the same fork, which
                  is as it was before; V(fork) makes a new one for each of them, too.
            choices: [none, fork]
            default: none
            env: [{name: MITOGEN_SINGLE_TASK_ISOLATION}]
            ini: [{section: mitogen_single, key: task_isolation}]
            vars: [{name: mitogen_single_task_isolation}, {name: mitogen_task_isolation}]
        via:
            description:
                - The host of the inventory from which this one is reached, itself reached as its own variables say. As
                  C(USER@HOST) it is logged in to as that user; as C(METHOD:USER@HOST) it becomes that user there.
            type: str
            vars: [{name: mitogen_single_via}, {name: mitogen_via}]
"""


# One of the options above.
def setting(name, variables=None):
    settings()
    return C.config.get_config_value(name, plugin_type='strategy', plugin_name='mitogen_single', variables=variables)


# They are a strategy's, wherever this file lies. Ansible reads the documentation of a strategy only for ansible-doc, so
# it is told here.
def settings():
    known = C.config.get_configuration_definitions('strategy', 'mitogen_single')
    if not known:
        known = yaml_load(DOCUMENTATION)['options']
        C.config.initialize_plugin_configuration_definitions('strategy', 'mitogen_single', known)
    return known


# Those that may differ from host to host become options of its connection plugin too: Ansible collects and templates
# the variables of these for every task.
@functools.lru_cache(maxsize=None)
def add_host_settings(plugin):
    known = dict(C.config.get_configuration_definitions('connection', plugin))
    known.update(('mitogen_single_' + name, definition) for name, definition in settings().items()
                 if 'vars' in definition and name != 'strategy')
    C.config.initialize_plugin_configuration_definitions('connection', plugin, known)


# 2 STRATEGY ##########################################################################################################
# How Ansible comes to run plays our way. Before its first play it imports whatever lies in its directories of callback
# and of vars plugins; ansible-playbook those of connection, become and shell plugins as well. That is all that we need:
# from then on a stock strategy is handed out with a run() of ours around its own. Where this file is a strategy plugin
# itself, it turns into a stock one, for the plays that ask for it.


# Takes the place of strategy_loader.get. Strategies of other people's run as they are. A run has one broker: where
# Mitogen has started its own, that stays the only one; where a play asks for Mitogen later, ours ends.
def carried_strategy(name, *args, **kwargs):
    if not setting('enabled') or mitogen_is_at_work():
        return stock_strategy(name, *args, **kwargs)
    with patched():         # the thread that reads results starts here
        strategy = stock_strategy(name, *args, **kwargs)
    run = getattr(type(strategy), 'run', None)
    if run and os.path.dirname(inspect.getfile(run)) == os.path.dirname(strategy_plugins.__file__):
        strategy.run = functools.partial(run_carried, strategy.run)
    elif run and run.__module__.startswith('ansible_mitogen.'):
        close_door()
    return strategy


def mitogen_is_at_work():
    if getattr(sys.modules.get('ansible_mitogen.process'), '_classic_worker_model', None):
        display.v('mitogen_single: not used from here on, an earlier play of this run asked for a strategy of Mitogen')
        return True


def stock_strategy(name, *args, **kwargs):
    return type(strategy_loader).get(strategy_loader, name, *args, **kwargs)


# Ansible may have loaded a strategy under another name than `import` does: what sleeps there is found by its function.
def run_carried(run, iterator, play_context):
    module = sys.modules[run.__module__]
    sleeping = [(module, 'time', with_sleep_until_news)] if hasattr(module, 'time') else []
    note_passwords(play_context)
    baton.spare_work = foreseeing(iterator._blocks)
    note_memories(*sys.modules)
    with patched(*sleeping), baton:
        return run(iterator, play_context)


class StrategyModule(StrategyBase):
    def __init__(self, tqm):
        self.tqm = tqm

    # Which strategy is wanted may stand in the play's variables, which only now are there. From here on this object is
    # one of that kind, and shares its state: Ansible goes on to ask it for more than run().
    def run(self, iterator, *args):
        name = iterator._play.strategy = strategy_name(self.tqm, iterator._play)    # callbacks and the debugger ask
        strategy = at_work.carried_strategy('ansible.builtin.' + name, self.tqm)
        self.__class__, self.__dict__ = type(strategy), vars(strategy)
        return self.run(iterator, *args)

    # If it did not get that far.
    def cleanup(self):
        pass


def strategy_name(tqm, play):
    named = re.search('(linear|free|host_pinned|debug)$', __name__)
    if named:
        return named.group()
    variables = tqm.get_variable_manager().get_vars(play=play)
    variable = 'mitogen_single_strategy'
    wanted = Templar(loader=tqm.get_loader(), variables=variables).template(variables.get(variable))
    return setting('strategy', {variable: wanted})


# What Ansible looks for in a plugin of each of the other kinds. None of them does anything.
class CallbackModule(CallbackBase):
    CALLBACK_TYPE = 'notification'


class VarsModule(BaseVarsPlugin):
    is_stateless = True

    def get_vars(self, loader, path, entities):
        return {}


class Connection:
    COMPATIBLE_SHELLS = ()


BecomeModule = ShellModule = Connection

# Of several copies of this file, under whatever names, the first to be loaded does the work of all: each would start a
# broker of its own, with connections of its own.
if __name__ != '__main__':
    at_work = sys.modules.setdefault('mitogen_single', sys.modules[__name__])
    if at_work.__version__ != __version__:
        display.warning('%s is not used, version %s of it is at work: %s'
                        % (__file__, at_work.__version__, at_work.__file__))
    if '.plugins.strategy.' not in __name__:
        strategy_loader.get = at_work.carried_strategy
    # Asked for by their full names Ansible would load them a second time, and we have changed and know these.
    for known in (copy_action, fetch_action, ssh_plugin):
        sys.modules.setdefault(known.__name__.replace('ansible.', 'ansible_collections.ansible.builtin.', 1), known)


# 3 PATCHES ###########################################################################################################
# All that we change in Ansible, for as long as a play runs under our strategy. A row: object, name of the attribute,
# what stands in its place, made from the original. Each replacement calls the original for whatever is not ours.
# Where a seam does not have the shape that we expect, the run is stock Ansible's, and one warning says so.


def patches():
    action = action_plugins.ActionBase
    return (
        # Connections of the kinds that we carry become ours; asked for by tasks, meta tasks and action plugins.
        (connection_loader, 'get_with_context', adopting),
        # Workers are threads where that is safe (§4). They and the main thread take turns, handed on by who waits.
        (strategy_plugins, 'WorkerProcess', choosing_worker),
        (strategy_plugins, 'results_thread_main', reading_results_in_turn),
        (strategy_plugins, 'time', with_sleep_until_news),
        (task_executor, 'time', with_sleep_in_turn),
        (copy_action, 'checksum', hashing_in_turn),
        *[(fetch_action, name, hashing_in_turn) for name in ('checksum', 'md5', 'secure_hash')],
        (Display, 'set_queue', setting_queue_in_forks),
        (lookup_loader, 'get', asking_lookups_apart),
        # What filters and lookups keep for later is kept from the next task.
        (PluginLoader, '_load_module_source', noting_memories),
        (_collection_finder._AnsibleCollectionPkgLoaderBase, 'exec_module', noting_memories),
        # Items of a loop do not wait for each other's answers where they may not.
        (task_executor.TaskExecutor, '_run_loop', running_items_ahead),
        # A plugin in a thread starts programs as a worker process would; one that needs such a process gets it, as long
        # as nobody has seen anything of its task.
        (subprocess.Popen, '__init__', starting_without_terminal),
        (signal, 'signal', handling_signals_apart),
        *those_there(
            (Conditional, 'evaluate_conditional_with_result', judging_apart),       # up to ansible-core 2.18
            (template_engine(), 'evaluate_conditional', judging_apart)),            # since then
        (os, '_exit', ending_the_worker),
        (FinalQueue, 'send_callback', noting_events),
        # Threads fork, too, and signals come at any moment.
        (popen_fork, 'os', with_undisturbed_fork),
        # What would come out alike for hosts, tasks and items is worked out once: settings, compiled templates.
        (ConfigManager, 'get_config_value_and_origin', remembering_settings),
        (ConfigManager, 'get_plugin_vars', listing_once),
        (ConfigManager, 'get_plugin_options_from_var', listing_once),
        (jinja2.Environment, '_compile', compiling_once),
        (module_common, '_is_binary', once_for_each_source),
        (module_common, 'NEW_STYLE_PYTHON_MODULE_RE', searching_once),
        # Values that Ansible would go through at length, to leave them as they are, and a parser that it would make for
        # nothing: since ansible-core 2.19.
        *those_there(
            (FieldAttributeBase, 'post_validate_attribute', validating_briefly),
            (utils_vars, 'transform_to_native_types', leaving_plain_values),
            (ssh_plugin, 'argparse', parsing_late)),
        # A module for one of our connections is built with a table of contents in the place of its zip ...
        (action, '_execute_module', preferring_agents),
        (action_plugins, 'modify_module', making_payloads),
        (module_common, 'zipfile', with_catalogue),
        (module_common, 'recursive_finder', finding_once),
        # ... which is enough to run it from RAM. Whoever wants a file on the target gets the real one.
        (action, '_transfer_data', transferring_real_bytes),
        # The temporary directory of a task costs no round trip.
        (action, '_make_tmp_path', making_tmp_path),
        (action, '_remove_tmp_path', removing_tmp_path),
        (action, '_fixup_perms2', fixing_perms),
        (action, '_remote_expand_user', expanding_user),
        # Pipelining is a question of cost, not of taste, once there is an agent: also for su, also where it is off.
        (action, '_is_pipelining_enabled', always_pipelining),
    )


# Seams that only some versions of Ansible have.
def those_there(*rows):
    return [row for row in rows if hasattr(*row[:2])]


_in_place = []          # (owner, name) of what is patched now


# A strategy of somebody else's may ask for a stock one while it is made itself: what is in place stays.
@contextlib.contextmanager
def patched(*more):
    rows = [row for row in patches() + more if row[:2] not in _in_place]
    missing = [name for owner, name, _ in rows if not hasattr(owner, name)]
    if missing:
        display.warning('mitogen_single does not know this version of Ansible (no %s): this play runs without it'
                        % ', '.join(missing))
        yield
        return
    before = _in_place[:]
    _in_place.extend(row[:2] for row in rows)
    try:
        with replaced(rows):
            yield
    finally:
        _in_place[:] = before


@contextlib.contextmanager
def replaced(rows):
    undo = []
    try:
        for owner, name, replacement in rows:
            original = vars(owner).get(name, undo)
            undo.append((owner, name, original))
            setattr(owner, name, replacement(getattr(owner, name)))
        yield
    finally:
        for owner, name, original in reversed(undo):
            if original is undo:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


# 4 WORKERS ###########################################################################################################
# Stock Ansible forks itself once per task and host: 3 ms in the main process, 9 ms in a child for what takes 2 in a
# warm process. Our worker is a thread that runs the same code, TaskExecutor and all. That code was not written for
# threads, so only the holder of one lock, the baton, runs any of it: the main thread, the thread that reads results, or
# one worker. It changes hands where somebody waits, and nowhere else: for the broker, in a sleep, for results.

WORKER_ARGUMENTS = ('final_q', 'task_vars', 'host', 'task', 'play_context', 'loader', 'variable_manager',
                    'shared_loader_obj', 'worker_id')       # in the order in which ansible-core 2.16 to 2.18 pass them
# Action plugins that were read with this in mind: they wait for nothing but connections, and keep no state. Not among
# them: pause (the keyboard), reboot and wait_for_connection (they sleep on their own), add_host and group_by (they ask
# the main thread), whatever a collection or a playbook brings.
REVIEWED = {'ansible.plugins.action.' + name for name in (
    'assemble assert async_status command copy debug dnf fail fetch gather_facts include_vars normal package raw '
    'script service set_fact set_stats shell template unarchive uri validate_argument_spec').split()}
# Connection plugins of which the same is known: what they start, they ask at most once for each host.
REVIEWED |= {'ansible.plugins.connection.ssh', 'ansible.plugins.connection.local'} | {
    'ansible_collections.%s.plugins.connection.%s' % tuple(name.rsplit('.', 1)) for name in (
        'community.docker.docker community.docker.nsenter community.general.chroot community.general.incus '
        'community.general.lxd community.okd.oc containers.podman.podman kubernetes.core.kubectl').split()}
# And lookup plugins, which find what they look for on this machine.
REVIEWED |= {'ansible.plugins.lookup.' + name for name in (
    'config csvfile dict env file fileglob first_found indexed_items ini inventory_hostnames items list nested '
    'random_choice sequence subelements template together unvault varnames vars').split()}
LOCALHOST = ('localhost', '127.0.0.1', '::1')
# Seconds of work, and of waiting, with the baton after which a task is too heavy to be done by one host after another.
# A forked worker costs 25 ms, and with two cores half of what it does is gained; a full machine lets wait 30 ms.
LONG = 0.05
LONG_WAIT = 0.1
_heavy = set()          # uuids of such tasks, and of those that need a main thread


def choosing_worker(stock):
    def worker(*args, **kwargs):
        given = dict(zip(WORKER_ARGUMENTS, args), **kwargs)
        door()
        warm_up(given['task'], given['task_vars'])
        if why_fork(given):
            return stock(*args, **kwargs)
        own = own_copies(given)
        with without_queues():
            process = stock(*[own[name] for name in WORKER_ARGUMENTS[:len(args)]],
                            **{name: own[name] for name in kwargs})
        process._new_stdin = None       # up to ansible-core 2.18 its start() would set it; nothing reads it any more
        return WorkerThread(process, functools.partial(stock, *args, **kwargs))
    return worker


# The one rule of what must not share a process, with its reasons; None for what may.
def why_fork(given):
    task, variables = given['task'], given['task_vars']
    connection = variables.get('ansible_connection') or task.connection
    if setting('workers') == 'fork' or variables.get('mitogen_single_enabled', True) is not True:
        return 'it was asked for'
    if not keeps_apart(variables):
        return 'it is to keep the terminal'
    if task.timeout:
        return 'a timeout is a signal, which only a main thread gets'
    if connection_module(connection) not in REVIEWED or not (task.delegate_to is None or task.delegate_to in LOCALHOST):
        return 'another connection plugin may wait where we cannot see it'
    if action_of(task) not in REVIEWED:
        return 'an action plugin that nobody reviewed'
    if task._uuid in _heavy:
        return 'it takes long on the controller: let hosts share the processors'


# Since ansible-core 2.21 a user can ask for workers that are not in a session of their own.
def keeps_apart(variables):
    name = 'WORKER_SESSION_ISOLATION'
    return not C.config.get_configuration_definition(name) or C.config.get_config_value(name, variables=variables)


# The module that the class of a task's action plugin comes from; None where only Ansible's full search can tell.
def action_of(task):
    return action_module(task.action, tuple(task.collections or ()))


@functools.lru_cache(maxsize=None)
def action_module(action, collections):
    if not isinstance(action, str) or '{' in action:
        return None
    module = module_loader.find_plugin_with_context(action, collection_list=list(collections))
    if module.resolved and module.action_plugin or action.rpartition('.')[2].split('_')[0] in C.NETWORK_GROUP_MODULES:
        return None
    if action_loader.has_plugin(action, collection_list=list(collections)):
        return source_of(action_loader.get(action, class_only=True, collection_list=list(collections)))
    return source_of(action_loader.get('ansible.legacy.normal', class_only=True))


@functools.lru_cache(maxsize=None)
def connection_module(name):
    plugin = load_class(connection_loader, 'ssh' if name == 'smart' else name)
    return source_of(plugin) if plugin else None


# The module that a plugin's class comes from, which for one of Ansible's own has another name where it was first asked
# for by its full one, as ansible.builtin.copy.
def source_of(plugin):
    return plugin.__module__.replace('ansible_collections.ansible.builtin.plugins.', 'ansible.plugins.', 1)


# What a fork would have copied, and a worker changes.
def own_copies(given):
    task = given['task'].copy(exclude_parent=True, exclude_tasks=True)
    task._parent = given['task']._parent
    variables = dict(given['task_vars'])
    if isinstance(variables.get('ansible_facts'), dict):
        variables['ansible_facts'] = variables['ansible_facts'].copy()
    if not hasattr(worker_process, '_task'):    # since ansible-core 2.19 templates get copies of their own
        variables = own_containers(variables, {})
    host = object.__new__(type(given['host']))
    vars(host).update(vars(given['host']))
    return dict(given, task=task, task_vars=variables, host=host, play_context=given['play_context'].copy(),
                loader=copy.copy(given['loader']))


# A template may append to a list: dicts and lists are copied, as often as they are used in several places, once.
def own_containers(value, known):
    if id(value) not in known:
        own = known[id(value)] = copy.copy(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (dict, list)):
                own[key] = own_containers(item, known)
    return known[id(value)]


# Prompts come to forked workers through a queue each; a thread needs none.
@contextlib.contextmanager
def without_queues():
    queue = worker_process.WorkerQueue
    worker_process.WorkerQueue = lambda **kwargs: None
    try:
        yield
    finally:
        worker_process.WorkerQueue = queue


# Has the face of a WorkerProcess, as the strategy and the task queue manager know it.
class WorkerThread(threading.Thread):
    def __init__(self, stock, anew):
        super().__init__(daemon=True)
        self.stock = stock
        self.anew = anew            # () -> another stock worker for the same task, of which nothing was touched yet
        self._task = stock._task
        self.worker_id = stock.worker_id
        self.outside = Outside(stock)
        self.clients = set()        # through which its threads ask the broker
        self.exitcode = None
        self.worker_queue = None    # prompts for a process, once it is one
        self.programs = []          # what its plugins started
        self.has_acted = False      # see note_action()
        self.is_ended = False       # somebody called terminate()

    # Over when the result is on its way: before the thread ends, and before anybody else gets the baton.
    def is_alive(self):
        return self.exitcode is None and not self.is_ended

    def run(self):
        baton.workers.add(self)
        with baton.held_by(self):
            try:
                code = 0 if self.is_ended else self.run_apart() if self._task._uuid in _heavy else self.run_here()
            except BaseException:
                code = 1        # "A worker was found in a dead state", as for a process that ended so
                if not self.is_ended:
                    display.error(traceback.format_exc())
            keep_client(self)
            self.exitcode = code
            baton.workers.discard(self)
        baton.news.set()

    def run_here(self):
        try:
            with task_context(self.stock):
                self.stock._run()
            return 0
        except NeedsMainThread:
            _heavy.add(self._task._uuid)
        finally:
            self.stock._loader.cleanup_all_tmp_files()
        self.stock = self.anew()
        return self.run_apart()

    # Be a stock worker after all: this host, or another one of this task, has shown meanwhile that it has to be one.
    def run_apart(self):
        self.stock.worker_queue = worker_process.WorkerQueue(ctx=multiprocessing_context)
        self.outside.take_off()
        with baton.kept():
            self.stock.start()
        self.outside.put_on()
        self.worker_queue = self.stock.worker_queue
        with baton.passed_on():
            multiprocessing_connection.wait([self.stock.sentinel])
        self.stock.join()
        return self.stock.exitcode

    def close(self):
        self.stock = None

    # `pid`: there is nothing to send a signal to. Where a process gets one, we get a call, or the process ends.
    pid = None

    def terminate(self):
        self.is_ended = True
        for line in list(self.clients):
            line.shut()
        if self.worker_queue:
            self.stock.terminate()
        for program in list(self.programs):
            if program.poll() is None:
                kill([-program.pid], signal.SIGTERM)
                with contextlib.suppress(OSError):      # it may not lead a group yet
                    os.kill(program.pid, signal.SIGTERM)

    kill = terminate

    # A plugin has started a program, maybe while the main thread, which asks nobody, was terminating this worker.
    def note_program(self, program):
        self.programs.append(program)
        if self.is_ended:
            self.terminate()


class NeedsMainThread(BaseException):
    """A plugin asks for what only a main thread can have, and nobody has seen anything of its task yet."""


# A filter may guard itself by an alarm. In a forked worker it can, and so it can in a process of its own.
def handling_signals_apart(set_handler):
    def patched_signal(*args):
        worker = _local.worker
        if worker and threading.current_thread() is not threading.main_thread():
            if not worker.has_acted or _local.judges:
                raise NeedsMainThread
        return set_handler(*args)
    return patched_signal


# changed_when, failed_when and until, when the task is over but for them: there the condition is what leaves.
def judging_apart(evaluate):
    def patched_evaluate(*args, **kwargs):
        worker = _local.worker
        if not worker or not worker.has_acted:
            return evaluate(*args, **kwargs)
        _local.judges = True
        try:
            return evaluate(*args, **kwargs)
        except NeedsMainThread:
            _local.judges = False
            ask = functools.partial(timed, evaluate, *args, **kwargs)
            return unwrapped(answer_from_a_process(ask) or ask())
        finally:
            _local.judges = False
    return patched_evaluate


# The class that has conditions evaluated since ansible-core 2.19.
def template_engine():
    return getattr(sys.modules.get('ansible._internal._templating._engine'), 'TemplateEngine', None)


# A plugin that ends its process ends a worker, and not all that threads of this one are at.
def ending_the_worker(end_process):
    ours = os.getpid()

    def patched_exit(code):
        if _local.worker and os.getpid() == ours:
            raise SystemExit(code)
        end_process(code)
    return patched_exit


# From here on the task cannot begin once more: it has sent an event, or reached for its host.
def note_action():
    worker = _local.worker
    if worker:
        worker.has_acted = True


def noting_events(send_callback):
    def patched_send(*args, **kwargs):
        note_action()
        return send_callback(*args, **kwargs)
    return patched_send


# The ambient task of ansible-core 2.19 and later.
def task_context(stock):
    if not hasattr(worker_process, '_task'):
        return contextlib.nullcontext()
    create = getattr(worker_process._task.TaskContext, 'create', None)
    if create:
        return create(task=stock._task, task_vars=stock._task_vars, host_name=stock._host.name)
    return worker_process._task.TaskContext(stock._task)


# What belongs to the process while a worker runs, and would have been its own in a fork: where it prints, who it says
# it is, its environment and directory, what plugins keep. Put on with the baton, taken off with it.
class Outside:
    def __init__(self, stock):
        self.stock = stock
        self.stdout, self.stderr = io.StringIO(), io.StringIO()
        self.changed = None         # the surroundings that a plugin left different at a handover
        self.kept = None            # Memory -> what plugins had kept in it, likewise; None until the first handover

    def put_on(self):
        self.before = sys.stdout, sys.stderr, surroundings()
        put_on_memories(self.kept)
        sys.stdout, sys.stderr = self.stdout, self.stderr
        display._final_q = self.stock._final_q
        worker_process.current_worker = self.stock
        if self.changed:
            set_surroundings(self.changed)
        self.thread = threading.get_ident()     # the worker's own, or an item's
        self.since = clocks()

    def take_off(self):
        worked, passed = [now - then for now, then in zip(clocks(), self.since)]
        waited = passed - worked
        if worked > LONG or waited > LONG_WAIT and waited - starved() > LONG_WAIT:
            _heavy.add(self.stock._task._uuid)
        sys.stdout, sys.stderr, before = self.before
        display._final_q = worker_process.current_worker = None
        after = surroundings()
        self.changed = after if after != before else None
        if self.changed:
            set_surroundings(before)
        self.kept = take_off_memories()

    # What a plugin's module does to them when it is imported stays: for the next worker it will not be imported again.
    def leave(self, before, after):
        stdout, stderr, surrounding = self.before
        self.before = stdout, stderr, tuple(new if new != old else outside for outside, old, new in
                                            zip(surrounding, before, after))


# What this thread has worked, and the time.
def clocks():
    return time.thread_time(), time.monotonic()


# Seconds that this thread would have worked, had there been a free core. Where 20 hosts are logged in to at once, from
# a machine of two cores, it comes to 0.1 s and more, which is no reason for yet more processes.
def starved():
    with contextlib.suppress(OSError):      # Linux knows
        return int(read_file('/proc/thread-self/schedstat').split()[1]) / 1e9
    return 0


# What is the process's own, and a fork would have kept to itself: environment, umask, locale, timeout of new sockets,
# directory. The environment as os.environ keeps it: to decode it takes 0.2 ms, ten times a task.
def surroundings():
    mask = os.umask(0o77)
    os.umask(mask)
    try:
        directory = os.getcwd()
    except OSError:
        directory = None
    return os.environ._data.copy(), mask, locale.setlocale(locale.LC_ALL), socket.getdefaulttimeout(), directory


def set_surroundings(wanted):
    environ, mask, words, timeout, directory = wanted
    os.umask(mask)
    locale.setlocale(locale.LC_ALL, words)
    socket.setdefaulttimeout(timeout)
    for name in os.environ._data.keys() - environ.keys():
        os.unsetenv(name)
    for name, value in environ.items():
        os.putenv(name, value)
    os.environ._data.clear()
    os.environ._data.update(environ)
    time.tzset()                                # which the environment decides over
    if directory:
        with contextlib.suppress(OSError):      # it was removed meanwhile
            os.chdir(directory)


# ---- what plugins keep
# A cache, a counter, a table that a filter writes to: what one forked worker makes of it no other one sees. So it is
# with threads: plain values of the modules of filters, tests, lookups and what they import of their collection, also
# those of the classes and objects in them, are put on and taken off with the baton. What functools keeps of a
# function's results is forgotten when a worker begins. Ansible's own plugins keep nothing.

KEEPERS = re.compile(r'\.plugins\.(filter|test|lookup)\.')
UTILITIES = re.compile(r'\.plugins\.(module_utils|plugin_utils)\.')
LONGEST_MEMORY = 100000     # bytes; what is longer is taken for a table that nobody writes to
# What Ansible's loader notes in the class of a plugin, each time that it hands it out.
LOADER_NAMES = {'_original_path', '_load_name', '_redirected_names', 'ansible_aliases', 'ansible_name'}
LRU_CACHE = type(functools.lru_cache(len))
_noted = set()              # names of modules
_memories = []              # what may change in them


def noting_memories(load):
    def patched_load(loader, *args, **kwargs):
        before = surroundings() if _local.worker else None
        result = load(loader, *args, **kwargs)
        note_memories((result or args[-1]).__name__)    # one of the two loaders is given the module to fill
        if _local.worker:
            _local.worker.outside.leave(before, surroundings())
        return result
    return patched_load


# Utilities count where a worker imports them, for one of those. What the main thread imports is for action plugins,
# hundreds of modules with a collection for network devices; those plugins get a process.
def note_memories(*names):
    for name in names:
        if name not in _noted and (KEEPERS.search(name) or _local.worker and UTILITIES.search(name)):
            _noted.add(name)
            _memories.extend(memories_of(sys.modules[name]))


def memories_of(module):
    ansibles_own = os.path.dirname(os.path.dirname(strategy_plugins.__file__)) + os.sep
    if str(getattr(module, '__file__', '')).startswith(ansibles_own):
        return
    yield from Memory.if_any(module, writes_globals(module))
    for value in list(vars(module).values()):
        home = value.__module__ if isinstance(value, type) else type(value).__module__
        if home == module.__name__ and hasattr(value, '__dict__'):
            yield from Memory.if_any(value, True)


def writes_globals(module):
    try:
        return 'global ' in module.__loader__.get_source(module.__name__)
    except Exception:       # who knows what loader it is, or there is no source
        return True


class Memory:
    """Of a module, a class or an object: names of plain values, and what functools.lru_cache() made."""

    @classmethod
    def if_any(cls, owner, is_bound_anew):
        memory = cls(owner, is_bound_anew)
        may_get_names = is_bound_anew and isinstance(owner, types.ModuleType)
        return [memory] if memory.names or memory.caches or may_get_names else []

    def __init__(self, owner, is_bound_anew):
        self.owner = owner
        self.names = [name for name, value in vars(owner).items()
                      if not name.startswith('__') and name not in LOADER_NAMES and is_short(value)
                      and (is_bound_anew or isinstance(value, (dict, list, set)))]
        self.caches = [value for value in vars(owner).values() if isinstance(value, LRU_CACHE)]
        self.before = self.now()

    # -> all names, plain values; None where one has become something else
    def now(self):
        values = vars(self.owner)
        try:
            return list(values), marshal.dumps([plain(values.get(name)) for name in self.names], 2)
        except ValueError:
            return None

    # -> what was kept since it was put on, by name
    def take_off(self):
        names, values = self.before
        kept = {name: value.copy() if isinstance(value, (dict, list, set)) else value
                for name, value in vars(self.owner).items() if name in self.names or name not in names}
        for name in kept.keys() - names - LOADER_NAMES:
            if not isinstance(kept[name], types.ModuleType):    # a package has those that were imported from it
                delattr(self.owner, name)
        self.put_on(zip(self.names, marshal.loads(values)))
        return kept

    # A dict, list or set stays the same one: other modules may know it.
    def put_on(self, values):
        for name, value in values:
            known = vars(self.owner).get(name)
            if isinstance(known, list) and isinstance(value, list):
                known[:] = value
            elif isinstance(known, (dict, set)) and isinstance(value, (dict, set)):
                known.clear()
                known.update(value)
            else:
                setattr(self.owner, name, value)


def plain(value):
    return dict(value) if isinstance(value, dict) else value


def is_short(value):
    try:
        return len(marshal.dumps(plain(value), 2)) < LONGEST_MEMORY
    except ValueError:
        return False


def put_on_memories(kept):
    for memory in _memories:
        memory.before = memory.now()
        if kept is None:
            for cache in memory.caches:
                cache.cache_clear()
        elif memory in kept:
            memory.put_on(kept[memory].items())


def take_off_memories():
    return {memory: memory.take_off() for memory in _memories if memory.before and memory.now() != memory.before}


# What belongs to one thread, to the main one as well; for §4 to §7.
class PerThread(threading.local):
    worker = None       # the WorkerThread that it is, or runs an item for; None while it keeps the baton, see kept()
    item = None         # the item of a loop that it runs
    client = None       # through which it asks the broker
    building = False    # whether the modules that it builds are Payloads, see payloads()
    judges = False      # whether it evaluates a condition, the action being over
    fetched = None      # the file that it fetched last


_local = PerThread()


class Baton:
    def __init__(self):
        self.lock = threading.RLock()       # which knows whose it is, whenever a signal comes
        self.news = threading.Event()       # a result came, or a worker ended: the main thread has something to do
        self.workers = set()                # those that have not ended
        self.is_broken = False              # an exception ended the play: the main thread keeps it
        self.spare_work = None              # an iterator: a step of it where the main thread would only wait

    # For the main thread, while a play runs. Ctrl-C ends the workers, as a signal ends forked ones: their turn
    # never comes again, and Ansible says goodbye alone.
    def __enter__(self):
        if not self.is_mine():
            self.lock.acquire()
        self.is_broken = False

    def __exit__(self, kind, *exc):
        self.is_broken = bool(kind)
        if kind:
            self.end_workers()
        else:
            self.lock.release()

    def is_mine(self):
        return self.lock._is_owned()

    def end_workers(self):
        for worker in list(self.workers):
            worker.terminate()

    # A filter that counts to infinity would keep it: SystemExit is thrown into the thread, at whatever it is.
    def take_from_workers(self):
        self.end_workers()
        while not self.lock.acquire(timeout=1):
            for worker in list(self.workers):
                if worker.stock is worker_process.current_worker:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.outside.thread),
                                                               ctypes.py_object(SystemExit))

    @contextlib.contextmanager
    def held_by(self, worker):
        _local.worker = worker
        self.lock.acquire()
        worker.outside.put_on()
        try:
            yield
        finally:
            try:
                worker.outside.take_off()
            finally:        # whatever happens, the others go on
                self.lock.release()

    # Around whatever a worker waits for. For anybody else it means nothing.
    @contextlib.contextmanager
    def passed_on(self):
        worker = _local.worker
        if worker:
            worker.outside.take_off()
            self.lock.release()
        try:
            yield
        finally:
            if worker:
                self.lock.acquire()
                worker.outside.put_on()
                self.leave_if_ended()

    # For a worker that somebody has terminated: whatever it would do or say now is of no interest any more.
    def leave_if_ended(self):
        if _local.worker and _local.worker.is_ended:
            raise SystemExit

    # Around what takes long only once: it says nothing about the task.
    @contextlib.contextmanager
    def uncounted(self):
        began = clocks()
        yield
        worker = _local.worker
        if worker:
            worker.outside.since = [then + now - before for then, now, before in
                                    zip(worker.outside.since, clocks(), began)]

    # Around a wait that is known to be short, and inside of which nobody else may run.
    @contextlib.contextmanager
    def kept(self):
        worker, _local.worker = _local.worker, None
        try:
            yield
        finally:
            _local.worker = worker

    # The main thread, instead of its sleep of 1 ms between two looks at the results. Forked workers end without a word,
    # so as long as there are any it has to look again soon. Where no news comes it does some of the spare work.
    def wait_for_news(self, seconds):
        if not self.is_mine() or threading.current_thread() is not threading.main_thread():
            return time.sleep(seconds)
        patience = 0.005 if self.spare_work else 0.002 if multiprocessing.active_children() else 0.2
        try:
            self.lock.release()
            is_idle = not self.news.wait(patience)
            self.news.clear()
            self.lock.acquire()
        except BaseException:
            if not self.is_mine():      # Ctrl-C may come when it is not given away yet, or just back
                self.take_from_workers()
            raise
        if is_idle and self.spare_work and not next(self.spare_work, None):
            self.spare_work = None


baton = Baton()


ENDING = signal.SIGINT, signal.SIGTERM


# What Ctrl-C raises is lost in the hooks that Python calls around a fork, and so are locks that they had taken: the
# next thread that forks would wait for that of the logging for ever. And in the child it would lead back into the
# code of the thread that forked. There a signal just ends it, until it says otherwise.
def fork_undisturbed():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        pid = os.fork()
        if not pid:
            for number in ENDING:
                signal.signal(number, signal.SIG_DFL)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def with_undisturbed_fork(original):
    return varied(original, fork=fork_undisturbed)


def with_sleep_until_news(original):
    return varied(original, sleep=baton.wait_for_news)


def with_sleep_in_turn(original):
    def sleep(seconds):
        with baton.passed_on():
            time.sleep(seconds)
    return varied(original, sleep=sleep)


# 2 s for a file of 1 GiB, in which nothing of Ansible's runs that others could disturb. What was just fetched was
# hashed on its way.
def hashing_in_turn(hash_file):
    def patched_hash(*args):
        fetched = _local.fetched
        known = fetched and args == (fetched.path,) and fetched.hashed_by(hash_file.__name__)
        if known:
            return known
        with baton.passed_on():
            return hash_file(*args)
    return patched_hash


# The thread that reads results runs callbacks, too, as if it was alone with them.
def reading_results_in_turn(results_thread_main):
    def patched_main(strategy):
        reader = Reader(strategy)
        try:
            results_thread_main(reader)
        finally:
            reader.put_down()
    return patched_main


# That thread's view of its strategy, with another queue: it gives the baton back before it waits, and takes it when
# there is something. What workers write is collected by a thread that needs no baton: a pipe holds 64 kB, and a worker
# that waited for room in it with the baton in its hand would wait for ever. After Ctrl-C they may still write when the
# strategy has asked for the end of the reading.
class Reader:
    def __init__(self, strategy):
        self.strategy, self.queue, self._final_q = strategy, strategy._final_q, self
        self.collected = queue.SimpleQueue()
        self.has_baton = False
        threading.Thread(target=self.collect, daemon=True).start()

    def __getattr__(self, name):
        return getattr(self.strategy, name)

    def collect(self):
        item = None
        while not isinstance(item, Exception) and (
                baton.is_broken or not isinstance(item, strategy_plugins.StrategySentinel)):
            try:
                item = self.queue.get()
            except Exception as e:      # the run is over, or a worker sent what nobody can read
                item = e
            self.collected.put(item)

    def get(self):
        self.put_down()
        item = self.collected.get()
        if isinstance(item, Exception):
            raise item
        wants_baton = type(item).__name__ != 'PromptSend'   # which waits for the keyboard, and touches nothing else
        while wants_baton and not self.has_baton and not baton.is_broken:
            self.has_baton = baton.lock.acquire(timeout=0.2)
        return item

    def put_down(self):
        if self.has_baton:
            self.has_baton = False
            baton.lock.release()
            baton.news.set()


# Up to ansible-core 2.18 a worker does this for itself. For a thread it is done whenever it gets the baton.
def setting_queue_in_forks(set_queue):
    def patched_set(self, queue):
        if not _local.worker:
            set_queue(self, queue)
    return patched_set


# A stock worker has no stdin and no terminal, so neither have the programs that its plugins start.
def starting_without_terminal(start):
    def patched_init(process, args, bufsize=-1, executable=None, stdin=None, stdout=None, stderr=None, *more,
                     **options):
        worker = _local.worker
        if worker:
            stdin, stdout, stderr = [subprocess.DEVNULL if f is None else f for f in (stdin, stdout, stderr)]
            options.setdefault('start_new_session', True)
        start(process, args, bufsize, executable, stdin, stdout, stderr, *more, **options)
        if worker:
            worker.note_program(process)
    return patched_init


# ---- lookups
# A lookup plugin may ask a server, run a program, sleep: forked workers do so side by side. Those that were not
# reviewed do it in a process of their own, as their worker would have been, unless they prove to be quick.

QUICK = 0.025           # seconds; another process would take more
_longest = {}           # module of such a plugin -> the seconds that it took, at most


def asking_lookups_apart(get):
    def patched_get(*args, **kwargs):
        plugin = get(*args, **kwargs)
        if isinstance(plugin, LookupBase) and _local.worker:
            if source_of(type(plugin)) not in REVIEWED:
                plugin.run = in_a_process(source_of(type(plugin)), plugin.run)
        return plugin
    return patched_get


def in_a_process(name, run):
    def patched_run(*args, **kwargs):
        ask = functools.partial(timed, run, *args, **kwargs)
        answer = None if _longest.get(name, QUICK) < QUICK else answer_from_a_process(ask)
        answer = answer or ask()
        _longest[name] = max(_longest.get(name, 0), answer[0])
        return unwrapped(answer)
    return patched_run


def unwrapped(answer):
    _, result, errors, printed, warned, uses = answer
    sys.stdout.write(printed)
    for warning in warned:
        warning_context().capture(warning)
    for known, found in zip(deprecated_uses(), uses):
        known.update(found)
    for error, cause in zip(errors, errors[1:]):
        error.__cause__ = cause
    if errors:
        raise errors[0]
    return result


# -> seconds, result, the exception and what it came from, and what only another process has to tell of itself
def timed(run, *args, **kwargs):
    began, result, errors = time.monotonic(), None, []
    try:
        result = run(*args, **kwargs)
    except Exception as e:
        while e and e not in errors:
            errors.append(e)
            e = e.__cause__
    return time.monotonic() - began, result, errors, '', [], []


# None where it was killed, or where what it found cannot leave its process.
def answer_from_a_process(ask):
    ours, theirs = multiprocessing_context.Pipe(duplex=False)
    process = multiprocessing_context.Process(target=send_answer, args=(theirs, ask))
    with ours, theirs:
        with baton.kept(), display._lock:       # as stock workers are started: no thread that prints holds it then
            process.start()
        theirs.close()
        _local.worker.note_program(types.SimpleNamespace(pid=process.pid, poll=lambda: process.exitcode))
        try:
            with baton.passed_on():
                multiprocessing_connection.wait([ours])
            return ours.recv()
        except EOFError:
            return None
        finally:
            process.join()


# In the child, which has no terminal, like a stock worker. Of exceptions those stay here that are a way to return:
# Ansible knows them by who they are.
def send_answer(pipe, ask):
    os.setsid()
    for number in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stdout = io.StringIO()
    before = captured_warnings()
    seconds, result, errors, *_ = ask()
    warned = [warning for warning in captured_warnings() if warning not in before]
    if not any(type(error).__module__.startswith('ansible._internal') for error in errors):
        with contextlib.suppress(Exception):
            data = ForkingPickler.dumps((seconds, result, errors, sys.stdout.getvalue(), warned, deprecated_uses()))
            ForkingPickler.loads(data)
            pipe.send_bytes(data)


# Since ansible-core 2.19 a warning waits in a context until it becomes part of its task's result.
def warning_context():
    utils = getattr(sys.modules[Display.__module__], '_display_utils', None)
    return utils and utils.DeferredWarningContext.current(optional=True)


def captured_warnings():
    context = warning_context()
    return context.get_warnings() + context.get_deprecation_warnings() if context else []


# It also notes what deprecated values are used. -> a {id: use} for each template that is being made, outermost first.
# What is in the one of a forked process and was not in its parent's has an id that is free there.
def deprecated_uses():
    access = sys.modules.get('ansible._internal._templating._access')
    contexts = access.AnsibleAccessContext.current()._notify_contexts if access else []
    return [context._tripped_deprecation_info for context in contexts if hasattr(context, '_tripped_deprecation_info')]


# ---- loops
# 100 items over a link of 50 ms take 5 s of waiting one after the other. Where no item depends on the result of an
# earlier one they leave back to back, and the agent runs them one after the other: they share a lane. Each is run by
# Ansible's own loop code, as a loop of one item, in a thread of its own that takes the baton for the same worker. The
# next item begins when the request of this one is made, so also while the way is being opened that it is to go. They
# leave in the order of the items, and so runs what comes after an answer: events, results and changes come in the same
# order as ever. Where a module may return facts, which later items may want to see, the first item goes alone and shows
# whether it does.

AHEAD = 100             # items that wait for answers at once: a login takes 0.4 s, in which 50 are made ready
FACTLESS = {'ansible.plugins.action.' + name for name in ('command', 'shell')}
ONE_REQUEST = FACTLESS | {'ansible.plugins.action.normal'}
_lane_numbers = itertools.count(1)


def running_items_ahead(run_loop):
    def patched_run_loop(executor, items):
        if why_one_by_one(executor._task, items):
            return run_loop(executor, items)
        return Lane(executor, items, run_loop).run()
    return patched_run_loop


# The one rule of which items must wait for each other, with its reasons; None for those that need not. Copies and
# templates are such: what the second of their two requests says depends on the answer to the first.
def why_one_by_one(task, items):
    control = task.loop_control
    if not _local.worker:
        return 'the worker is a process'
    if len(items) < 3:
        return 'nothing to gain'
    if task.async_val or task.until or task.retries:
        return 'an item is more than one request'
    if action_of(task) not in ONE_REQUEST:
        return 'its action may be more than one request'
    if control.pause or control.extended or control.index_var or getattr(control, 'break_when', None):
        return 'the loop is more than its items'
    if '{' in str(task.no_log):
        return 'Ansible sums up what became of it'
    read = repr([getattr(task, name) for name in
                 ('args', 'when', 'environment', 'vars', 'delegate_to', 'become_user')])
    registered = [task.register] if isinstance(task.register, str) else task.register or ()
    if any(name in read for name in registered):
        return 'an item reads what the loop registers'
    if 'loop_result' in read + repr([task.changed_when, task.failed_when, task.register, control.label]):
        return 'an item reads what became of the others'


# A loop whose items are on their way. All of it is touched by the holder of the baton only.
class Lane:
    def __init__(self, executor, items, run_loop):
        self.executor = executor
        self.items = items
        self.run_loop = run_loop
        self.name = '%d.%d' % (os.getpid(), next(_lane_numbers))
        self.worker = _local.worker
        self.client = client()                      # requests leave in the order in which they are asked, and ..
        self.context = contextvars.copy_context()   # .. answers come in that order
        self.variables = task_variables(executor)   # what the last finished item knew
        self.connections = []                       # of items that are done, for others
        self.is_factless = is_factless(executor._task)
        self.ahead = AHEAD if self.is_factless else 1
        self.route = None                           # where the requests go that are on their way
        self.started = []                           # LoopItems, in order
        self.finished = 0
        self.error = None                           # what an item raised: no further one starts
        self.over = threading.Event()

    def run(self):
        self.start_next()
        with baton.passed_on():
            self.over.wait()
        if self.error:
            raise self.error
        return joined([item.result for item in self.started], self.items)

    # Called wherever something changed that a start waits for.
    def start_next(self):
        last = self.started[-1] if self.started else None
        index = len(self.started)
        if index == len(self.items) or self.error:
            if self.finished == index:
                self.over.set()
        elif index - self.finished < self.ahead and (not last or last.has_asked):
            item = LoopItem(self, self.items[index], last)
            self.started.append(item)
            item.start()

    def finish(self, item, error):
        self.error = self.error or error
        self.finished += 1
        if self.finished == 1 and not self.is_factless:
            self.ahead = 1 if error or returns_facts(item.result) else AHEAD
        self.start_next()


class LoopItem(threading.Thread):
    def __init__(self, lane, value, before):
        super().__init__(daemon=True)
        self.lane = lane
        self.value = value
        self.before = before                # the item in front of it, or None
        self.has_asked = False              # its request is made, or there is none any more: the next item may begin ..
        self.has_left = threading.Event()   # .. and when it is on its way, the request of the next one may follow
        self.is_done = threading.Event()
        self.result = None

    def run(self):
        _local.item = self
        with baton.held_by(self.lane.worker):
            error = None
            try:
                baton.leave_if_ended()
                self.result, self.lane.variables = self.lane.context.copy().run(run_alone, self)
            except BaseException as e:
                error = e
            self.has_asked = True
            self.has_left.set()
            self.is_done.set()
            self.lane.finish(self, error)

    # Called in front of each request; returns when it may leave. What runs a module is the one request of an item: as
    # long as it asks for something else, to find an interpreter say, the next item does not begin.
    def asks(self, head):
        if head['call'] == 'run':
            self.has_asked = True
            self.lane.start_next()
        if self.before and not self.before.has_left.is_set():
            with baton.passed_on():
                self.before.has_left.wait()

    # A request is about to be sent along this route; None: it is more than a frame. Where it may leave in front of
    # earlier answers, its lane is told in the request; otherwise all that went before is done when this returns.
    def may_go_ahead(self, route):
        lane = self.lane
        is_second = not self.has_asked or self.has_left.is_set()
        if not route or is_second or lane.ahead == 1 or lane.route not in (None, route):
            self.wait_for_turn()
        if not route or is_second or lane.ahead == 1:
            if lane.started[-1] is not self:
                lane.ahead = 1              # items behind it must not have been sent yet
            return False
        lane.route = route
        return True

    def sent(self):
        self.has_left.set()
        self.wait_for_turn()

    # What follows an item's execution are its events, also where it needed no request.
    def in_turn(self, execute):
        def executed(*args, **kwargs):
            try:
                return execute(*args, **kwargs)
            finally:
                self.wait_for_turn()
        return executed

    def wait_for_turn(self):
        if self.before and not self.before.is_done.is_set():
            with baton.passed_on():
                self.before.is_done.wait()
        self.before = None
        if _local.client is not self.lane.client:     # which is for him to read whose turn it is
            keep_client(self.lane.worker)
            _local.client = self.lane.client


# What differs between the versions: since ansible-core 2.21 the state of a loop is in the ambient task, which becomes
# the result of an item here. -> result, what the item knew in the end
def run_alone(item):
    lane, value = item.lane, item.value
    executor, variables = copy.copy(lane.executor), lane.variables.copy()
    executor._connection = lane.connections.pop() if lane.connections else None
    executor._execute = item.in_turn(executor._execute)
    try:
        if hasattr(executor, '_job_vars'):
            executor._job_vars = variables
            return lane.run_loop(executor, [value]), variables
        with worker_process._task.TaskContext.create(executor._task, variables, executor._host.name) as context:
            lane.run_loop(executor, [value])
            return context, variables
    finally:
        lane.connections.append(executor._connection)


# Also a command of the user's own goes by the name of Ansible's.
def is_factless(task):
    return (action_of(task) in FACTLESS and
            module_loader.find_plugin('ansible.legacy.command') == module_loader.find_plugin('ansible.builtin.command'))


def task_variables(executor):
    if hasattr(executor, '_job_vars'):
        return executor._job_vars
    return worker_process._task.TaskContext.current()._base_task_vars


def returns_facts(first):
    facts = first[0].get('ansible_facts') if isinstance(first, list) else first._raw_loop_results[0].ansible_facts
    return any(not name.startswith('discovered_interpreter_') for name in facts or ())


# What Ansible's loop would have left behind, and returned.
def joined(results, items):
    if isinstance(results[0], list):
        return list(itertools.chain(*results))
    context = worker_process._task.TaskContext.current()
    raw = [result for one in results for result in one._raw_loop_results]
    vars(context).update(vars(results[-1]), _task=context._task, _raw_loop_results=raw, _loop_items=items,
                         _item_index=len(items) - 1)
    return context.build_loop_result()


# ---- what would be worked out again and again
# For each task, host and item Ansible makes a new connection, become and shell plugin and asks for some 50 settings of
# theirs, the way from variables by environment and ansible.cfg to the default: 2.5 ms of 14. Most stand in none of the
# variables, and so have the answer that they had before.


@dataclasses.dataclass
class Answer:
    names: list             # where else it might stand: in variables, keywords or arguments of these names
    environ: dict           # name -> value of the variables of the environment that it may come from, as os keeps them
    value: object
    origin: str

    # Plain loops, for 50 of them.
    def holds(self, places):
        for place in places:
            for name in self.names:
                if name in place:
                    return False
        for name, value in self.environ.items():
            if os.environ._data.get(name) != value:
                return False
        return True

    def again(self):
        return self.value.copy() if isinstance(self.value, list) else self.value, self.origin


UNCHANGING = (str, int, float, bool, type(None))
_answers = {}           # option, config file, kind and name of the plugin -> Answer


def remembering_settings(ask):
    def patched_ask(manager, config, cfile=None, plugin_type=None, plugin_name=None, keys=None, variables=None,
                    direct=None, **more):
        question = config, cfile, plugin_type, plugin_name
        places = [place for place in (keys, variables, direct) if place]
        if question in _answers and _answers[question].holds(places):
            return _answers[question].again()
        noise = len(manager.DEPRECATED), len(manager.WARNINGS)
        value, origin = ask(manager, config, cfile, plugin_type, plugin_name, keys, variables, direct, **more)
        # Not what comes with a word to the user, what can be changed in place (of a list everybody gets a copy), or
        # what a template makes.
        if (noise == (len(manager.DEPRECATED), len(manager.WARNINGS))
                and all(isinstance(item, UNCHANGING) for item in (value if isinstance(value, list) else [value]))):
            definition = manager.get_configuration_definitions(plugin_type, plugin_name).get(config, {})
            answer = Answer(places_of_setting(config, definition), environment_of_setting(definition), value, origin)
            if '{' not in str(definition.get('default')) and answer.holds(places):
                _answers[question] = answer
                return answer.again()
        return value, origin
    return patched_ask


def places_of_setting(config, definition):
    named = [entry['name'] for kind in ('vars', 'keyword') for entry in definition.get(kind) or ()]
    return [config, *definition.get('aliases', ()), *named]


def environment_of_setting(definition):
    names = [os.fsencode(entry['name']) for entry in definition.get('env') or ()]
    return {name: os.environ._data.get(name) for name in names}


# Ansible looks through all that is known of a plugin for the variables of its settings, five times a task.
def listing_once(list_of):
    lists = {}

    def patched_list(manager, plugin_type, name, *variable):
        settings = manager._plugins.get(plugin_type, {}).get(name, ())      # to which add_host_settings() adds ours
        question = plugin_type, name, len(settings), *variable
        if question not in lists:
            lists[question] = list_of(manager, plugin_type, name, *variable)
        return lists[question].copy()
    return patched_list


# Jinja makes Python of a template or a condition, and compiles that whenever it comes to it: half of the 1 ms that the
# label of a loop's item takes. What environment it is for does not matter; how long it is does, for what is kept. What
# stands in its place is made once, too, so that what it keeps outlives a play.
@functools.lru_cache(maxsize=None)
def compiling_once(compile_source):
    compiled = functools.lru_cache(maxsize=500)(functools.partial(compile_source, None))

    def patched_compile(environment, source, filename):
        if len(source) > 20000:
            return compile_source(environment, source, filename)
        return compiled(source, filename)
    return patched_compile


# What kind of module a file is: 0.4 ms of regular expressions.
def once_for_each_source(judge):
    judged = functools.lru_cache(maxsize=50)(judge)

    def patched_judge(source):
        return judged(source) if len(source) < 200000 else judge(source)
    return patched_judge


def searching_once(pattern):
    return types.SimpleNamespace(search=once_for_each_source(pattern.search))


# Each ssh connection object has a parser for options, of which one in ten thousand makes use: 0.4 ms.
def parsing_late(original):
    return varied(original, ArgumentParser=LateParser)


class LateParser:
    make, arguments = argparse.ArgumentParser, ()       # of a copy that is just being made

    def __init__(self, *args, **kwargs):
        self.make = functools.partial(argparse.ArgumentParser, *args, **kwargs)
        self.arguments = []

    def add_argument(self, *args, **kwargs):
        self.arguments.append((args, kwargs))

    # Anything else needs the real one.
    def __getattr__(self, name):
        parser = self.make()
        for args, kwargs in self.arguments:
            parser.add_argument(*args, **kwargs)
        return getattr(parser, name)


# A task, its block and its play context have 125 keywords, of which a playbook sets three. The others are None, or have
# the type that they are to have, and nothing of a template in them: it takes 1 ms of 9 to find that out at length.
SETTLED = {'bool': ['bool'], 'int': ['int'], 'float': ['float'], 'string': ['str', '_AnsibleTaggedStr']}


def validating_briefly(validate):
    def patched_validate(thing, name, *, templar):
        value = getattr(thing, name)
        if type(value).__name__ in settled_types(type(thing), name):
            if value is None:
                return Sentinel         # which is the word for: leave it as it is
            if not isinstance(value, str) or '{' not in value and '#' not in value:
                return value
        return validate(thing, name, templar=templar)
    return patched_validate


@functools.lru_cache(maxsize=None)
def settled_types(kind, name):
    keyword = kind.fattributes[name]
    types = [] if keyword.required else ['NoneType']
    if kind._post_validate_object and not keyword.static and not hasattr(kind, '_post_validate_' + name):
        types += SETTLED.get(keyword.isa, ())
    return types if not issubclass(kind, IncludeRole) else ()


# What is shown of a result are values without Ansible's marks: for a loop of 100 commands 0.15 s.
def leaving_plain_values(transform):
    def patched_transform(value, redact=True):
        kind = type(value)
        if kind in UNCHANGING:
            return value
        if kind is dict:
            return {patched_transform(name, redact): patched_transform(item, redact) for name, item in value.items()}
        if kind is list:
            return [patched_transform(item, redact) for item in value]
        if kind.__name__ == '_AnsibleTaggedStr':
            return value._native_copy()
        return transform(value, redact)
    return patched_transform


# What each worker would load for itself, and a forked one would forget again, is loaded once: the parsing of the ssh
# plugin's documentation alone takes 15 ms.
def warm_up(task, variables):
    load_class(action_loader, task.action, tuple(task.collections or ()))
    load_class(action_loader, 'ansible.legacy.normal')
    load_class(shell_loader, 'sh')
    load_class(connection_loader, variables.get('ansible_connection') or task.connection)
    if task.become:
        load_class(become_loader, variables.get('ansible_become_method') or task.become_method)
    freeze()


# Once for each name. Names may still be templates here, or unknown, or lead to a file that Python cannot read: what
# becomes of them is the worker's business.
@functools.lru_cache(maxsize=None)
def load_class(loader, name, collections=()):
    with contextlib.suppress(Exception):
        if isinstance(name, str) and '{' not in name and loader.has_plugin(name, collection_list=list(collections)):
            return loader.get(name, class_only=True, collection_list=list(collections))


# What is here now will stay. A garbage collection in a forked worker would otherwise touch, and so copy, all of it.
# What of it is garbage is not worth the 60 ms that it takes to find out.
@functools.lru_cache(maxsize=None)
def freeze():
    gc.freeze()


# 5 CONNECTION ########################################################################################################
# The stock connection plugin's own instance, which has all its options from Ansible, with a few methods in front of
# its class. So isinstance() holds, get_option() works, and super() is the stock way, taken for all that we cannot do.


def adopting(get_with_context):
    def patched_get(name, *args, **kwargs):
        result = get_with_context(name, *args, **kwargs)
        if isinstance(result.object, ConnectionBase):
            adopt(result.object)
        return result
    return patched_get


def adopt(connection):
    stock = type(connection)
    if issubclass(stock, AgentConnection):
        return
    reason = why_stock(connection)
    if reason:
        explain(connection, NoAgent(reason))
    else:
        add_host_settings(connection._load_name)
        connection.__class__ = agent_class(stock)


# Why a connection plugin cannot carry an agent, as far as its class tells; None where it is worth a try.
def why_stock(connection):
    if getattr(connection, '_remote_is_local', False):
        return 'it runs modules here, not on the target'
    if getattr(connection._shell, '_IS_WINDOWS', False):
        return 'there is a Windows on the target'
    if not starts_programs(type(connection)):
        return 'this connection plugin starts no program'


# Whether the modules that a class and its bases come from have anything of subprocess.
@functools.lru_cache(maxsize=None)
def starts_programs(plugin):
    return any(value is subprocess or getattr(value, '__module__', None) == 'subprocess'
               for base in plugin.__mro__ for value in vars(sys.modules[base.__module__]).values())


# Once for each host and step, whichever of the workers comes across it first. Stock Ansible knows no way by way of
# another host, and must not try without.
def explain(connection, reason):
    host = connection._play_context.remote_addr
    if connection._options.get('mitogen_single_via'):
        raise AnsibleConnectionFailure('%s: no agent, and so no way by %s: %s' % (
            host, connection._options['mitogen_single_via'], reason))
    if display.verbosity and client().is_first('%s: %s' % (host, reason.step)):
        display.v('stock Ansible runs this, there is no agent: %s' % reason, host=host)


# The name must stay: Ansible derives the plugin's type from it.
@functools.lru_cache(maxsize=None)
def agent_class(stock):
    return type(stock.__name__, (AgentConnection, stock), {'__module__': stock.__module__})


# Its base is one that it shares with the stock plugins: otherwise no instance could change over.
class AgentConnection(ConnectionBase):
    _escalation = None      # the last command that Ansible wrapped for become
    _plain_build = None     # the become plugin's own build_become_command
    _wants_files = False    # modules are to be run from files on the target
    _place = None           # the Place of this task's temporary files, where it is ours
    _interpreter = None     # the Plan of the last module's interpreter: its agent gets the files for the next one
    _refusal = None         # why stock Ansible has to run this; '' for no reason; None: not looked at yet
    _hostvars = None        # the variables of all hosts, of which some may be on the way
    _passed = ()            # where it is on the way to another host: its name, after those that come later
    _way = None             # the Way, once it was asked for

    # Pipelining is ours to decide, but for somebody who set it to false for this very host or task.
    def set_options(self, task_keys=None, var_options=None, direct=None):
        super().set_options(task_keys=task_keys, var_options=var_options, direct=direct)
        self._refusal = self._way = None
        self.note_hosts(var_options or {})
        self._wants_files = any(name in (var_options or {}) and not boolean(var_options[name], strict=False)
                                for name in ('ansible_pipelining', 'ansible_ssh_pipelining'))

    # Whether the next item of a loop may use it, too.
    @property
    def connected(self):
        return self._refusal == '' or super().connected

    # Called by tasks, and by a reset since ansible-core 2.17.
    def update_vars(self, variables):
        super().update_vars(variables)
        self.note_hosts(variables)

    def _resolve_option_variables(self, variables, templar):
        self.note_hosts(variables)
        return super()._resolve_option_variables(variables, templar)

    def note_hosts(self, variables):
        self._hostvars = variables.get('hostvars', self._hostvars)

    def set_become_plugin(self, plugin):
        super().set_become_plugin(plugin)
        if plugin:
            build = self._plain_build = plugin.build_become_command

            def build_become_command(cmd, shell):
                wrapped = build(cmd, shell)
                self._escalation = Escalation(cmd, wrapped)
                return wrapped

            plugin.build_become_command = build_become_command

    def exec_command(self, cmd, in_data=None, sudoable=True):
        note_action()
        try:
            carrier = is_carried(self) and Carrier(self)
            # A shell command on this machine costs no more the stock way.
            if carrier and (isinstance(in_data, Payload) or carrier.leads_away):
                display.vvv('EXEC %s' % to_text(cmd), host=self._play_context.remote_addr)
                command = Command(to_text(cmd), self._escalation, self._play_context.executable)
                return carrier.run(command, in_data, sudoable)
        except NoAgent as e:
            if isinstance(in_data, Payload) or self._place and self._place.modules:
                raise
            explain(self, e)
        return super().exec_command(cmd, in_data=in_data, sudoable=sudoable)

    def put_file(self, in_path, out_path):
        return self.transfer_by_agent('PUT', Carrier.put, super().put_file, in_path, out_path)

    def fetch_file(self, in_path, out_path):
        return self.transfer_by_agent('FETCH', Carrier.fetch, super().fetch_file, in_path, out_path)

    def transfer_by_agent(self, verb, ours, stock, in_path, out_path):
        note_action()
        try:
            carrier = is_carried(self) and Carrier(self)
            if carrier and carrier.leads_away:
                display.vvv('%s %s TO %s' % (verb, in_path, out_path), host=self._play_context.remote_addr)
                return ours(carrier, in_path, out_path)
        except NoAgent as e:
            explain(self, e)
        return stock(in_path, out_path)

    def reset(self):
        if is_carried(self):
            client().order(call='drop', key=Carrier(self).login().key)
        if not self._options.get('mitogen_single_via'):
            super().reset()

    # The command that the stock plugin would start for this one. Passwords are answered by us, on a pty, not through
    # sshpass or SSH_ASKPASS. A user who says nothing of ssh_args gets no master that outlives the run, which one link
    # does not need, and no compression of what we have compressed already.
    def agent_argv(self, command):
        options = dict(password_mechanism='disable')
        if 'ssh_args' in self._options:
            options['ssh_args'] = ssh_settings(self)
        with temporary_files_in(C.DEFAULT_LOCAL_TMP):
            argv, cwd, env = caught(self, super().exec_command, command, options)
        # A terminal that its arguments ask for, for some sudo to see, would garble the data. Our sudo has its own.
        if getattr(self, '_is_tty_requested', bool)():
            argv[-2:-2] = ['-T']
        return argv, cwd, env


# Whether it is for us to compress what shrinks. Who sets ssh_args decides that, too.
def compresses(connection):
    options = connection._options
    return options.get('ssh_args') == default_ssh_args() and not options.get('mitogen_single_ssh_compression')


# With ssh the first word on a matter counts.
def ssh_settings(connection):
    options = connection._options
    compression = {True: 'yes', False: 'no', None: None}[options['mitogen_single_ssh_compression']]
    wanted = (('Compression', compression), ('ServerAliveInterval', options['mitogen_single_ssh_keepalive_interval']),
              ('ServerAliveCountMax', options['mitogen_single_ssh_keepalive_count']))
    words = ['-o %s=%s' % (name, value) for name, value in wanted if value is not None]
    return ' '.join(words + ['-o Compression=no' if compresses(connection) else options['ssh_args'] or ''])


@functools.lru_cache(maxsize=None)
def default_ssh_args():
    return C.config.get_configuration_definitions('connection', 'ssh')['ssh_args']['default']


def is_carried(connection):
    if not isinstance(connection, AgentConnection) or not connection._options.get('mitogen_single_enabled', True):
        return False
    if connection._refusal is None:
        connection._refusal = ''
        try:
            identity_of(connection)
        except NoAgent as e:
            refuse(connection, e)
    return not connection._refusal


def refuse(connection, reason):
    connection._refusal = str(reason)
    explain(connection, reason)


# What an AgentConnection does with the help of the broker; beside it, so that no name of ours hides one of the stock
# plugin's.
class Carrier:
    def __init__(self, connection):
        self.connection = connection
        self.context = connection._play_context
        self.host = self.context.remote_addr
        self.shell = self.context.executable or '/bin/sh'
        self.identity = identity_of(connection)
        self.way = way_to(connection)
        self.leads_away = bool(self.way) or leads_away(self.identity)
        # Seconds without a sign of life after which a become is given up; the stock ssh plugin takes as many.
        self.silence = 2 + int(self.option('timeout') or self.context.timeout or 10)
        # Local commands run in the playbook's directory: Ansible sets this attribute before each of them.
        cwd = getattr(connection, 'cwd', None)
        self.cwd = os.fsdecode(cwd) if cwd else None

    def option(self, name):
        try:
            return self.connection.get_option(name)
        except (KeyError, AttributeError):
            return None

    def run(self, command, in_data, sudoable):
        account, place = self.account(command.escalated), self.connection._place
        if isinstance(in_data, Payload):
            result = self.run_module(account, in_data, *command.interpreter())
            self.renew_accounts(account[0], in_data, result[1])
            return result
        if place and place.modules:
            words, env = command.interpreter()
            return self.run_module(account, *job_in(place, words), env)
        argv = command.argv or self.in_own_shell(command.plain)
        head = dict(call='exec', argv=argv, cwd=self.cwd, tty=self.wants_tty(in_data, sudoable))
        return self.collect(account, None, head, in_data or b'')

    def run_module(self, account, payload, words, env):
        self.leave_account(account[0], payload.started or payload)
        again = payload.leaves_nothing() and self.option('mitogen_single_task_isolation') != 'fork'
        early, env = at_start(env)
        around = dict(env=env, cwd=self.cwd, again=again)
        interpreter = self.connection._interpreter = interpreter_plan(account[-1], early + words, self.silence)
        try:
            return self.collect(account, interpreter, dict(payload.head(), **around), payload.params)
        except UnknownModule:
            payload = payload.rebuild()
            return self.collect(account, interpreter, dict(payload.head(), **around), payload.params)

    # A command without a shell of Ansible's, a raw one, is for the shell that the plugin gives it to: one word for the
    # login shell.
    def in_own_shell(self, command):
        *_, shell, option, last = self.identity[0]
        if last != PLACEHOLDER:
            raise NoAgent('this connection plugin takes a command apart')
        return [shell, option, command] if option == '-c' else [command]

    # userdel refuses while an agent of ours runs as that user. Stock Ansible has no process left there by then.
    def leave_account(self, login, module):
        name, given = account_in(module)
        if given.get('state') == 'absent':
            with contextlib.suppress(NotConnected):
                self.ask(dict(call='retire', to=[login.key], interpreter=None, name=name), b'')

    # Stock Ansible begins a session and a Python for each task, and an agent is one that goes on. Once a module has
    # changed what they begin with, the next task gets a new one: shell, sudo, PAM and site.py have the word on what
    # that means. What a script changes shows in none of its arguments; for that there is meta: reset_connection.
    def renew_accounts(self, login, module, output):
        if b'"changed": true' in output:
            name, _ = account_in(module)
            is_login = bool(LOGIN_BEGINS.search(module.params)) or changes_python(module, output)
            if name or is_login or SESSION_BEGINS.search(module.params):
                client().order(call='renew', key=login.key, user=name, login=is_login)

    # The hops that lead to the account in which a command is to run.
    def account(self, escalated):
        login = self.login()
        if not escalated:
            return [login]
        return [login, become_plan(login, self.connection.become, self.connection._plain_build, self.connection._shell,
                                   self.shell, self.silence, self.cwd)]

    def login(self):
        is_ssh = isinstance(self.connection, ssh_plugin.Connection)
        return login_plan(self.connection, self.shell, max(self.silence, self.option('mitogen_single_boot_timeout')),
                          self.identity, is_ssh, self.way.account[-1] if self.way else None)

    # Stock ssh asks for a terminal for commands without input: sudo in a raw task may need one, and `ls` behaves.
    def wants_tty(self, in_data, sudoable):
        return bool(not in_data and sudoable and self.option('use_tty'))

    def collect(self, account, interpreter, head, body):
        out = {STDOUT: [], STDERR: []}
        try:
            reply = self.call(account, interpreter, head, body, on_data=lambda channel, data: out[channel].append(data))
        except BecomeEnded as e:
            return e.head['code'], to_bytes(e.head['stdout']), to_bytes(e.head['stderr'] + e.head['tty'])
        result = reply['rc'], b''.join(out[STDOUT]), b''.join(out[STDERR])
        if self.leads_away:
            shown = 'rc=%s, stdout and stderr censored due to no log' % result[0] if self.context.no_log else result
            display.vvv(str(shown), host=self.host)
        return result

    # A file for the task's own directory is written by the account that is to read it. A small one needs no answer
    # before the next request leaves, which the same agent takes after it.
    def put(self, in_path, out_path):
        place, account, interpreter = self.connection._place, [self.login()], None
        head = dict(call='put', path=to_text(out_path))
        is_private = place and head['path'].startswith(place.path + '/')
        if is_private:
            account, interpreter = self.account(place.escalated), self.connection._interpreter
        try:
            source = open(to_bytes(in_path, errors='surrogate_or_strict'), 'rb')
        except FileNotFoundError:
            raise AnsibleFileNotFound('file or module does not exist: %s' % to_text(in_path))
        with source:
            info = os.fstat(source.fileno())
            head['mode'] = info.st_mode & 0o777 | (0o700 if is_private else 0)
            if is_private and interpreter and info.st_size <= CHUNK:
                return place.post(self.addressed(account, interpreter, head), source.read())
            self.transfer(in_path, out_path, account, interpreter, head, source=source)

    def fetch(self, in_path, out_path):
        with FetchedFile(out_path) as target:
            self.transfer(in_path, out_path, [self.login()], None, dict(call='get', path=to_text(in_path)),
                          target=target)
        _local.fetched = target

    def transfer(self, in_path, out_path, account, interpreter, head, **files):
        try:
            self.call(account, interpreter, dict(head, squeeze=compresses(self.connection)), **files)
        except CallFailed as e:
            raise AnsibleError('failed to transfer file to %s %s:\n\n%s' % (to_text(in_path), to_text(out_path), e))

    # Ask; where the way is not open yet, open it and ask again.
    def call(self, account, interpreter, head, body=b'', **more):
        head, item = self.addressed(account, interpreter, head), _local.item
        try:
            if item:
                item.asks(head)
                if account[-1].key not in _hellos:      # to find out by asking, later items would have to ask, too
                    item.wait_for_turn()
                    self.connect_all(account, interpreter)
            try:
                return self.ask(head, body, **more)
            except NotConnected:
                self.connect_all(account, interpreter)
                return self.ask(head, body, **more)
        except (LinkLost, NotConnected) as e:
            raise AnsibleConnectionFailure('%s: the connection was lost: %s' % (self.where(), e))
        except NoDirectory as e:
            raise AnsibleConnectionFailure(
                'Failed to create temporary directory. Consider changing the remote tmp path in ansible.cfg to a path '
                'rooted in "/tmp". %s: %s' % (self.where(), e))

    # To which agents, and with which directory.
    def addressed(self, account, interpreter, head):
        place = self.connection._place
        if place and place.escalated == (len(account) > 1) and self.connection._shell.tmpdir == place.path + '/':
            place.is_made = True
            head = dict(head, tmpdir=place.path)
        return dict(head, to=[plan.key for plan in (interpreter, account[-1]) if plan],
                    interpreter=interpreter.words if interpreter else None)

    # After files that are still on their way, in front of the answers of earlier items, or just so.
    def ask(self, head, body, **more):
        place, item = self.connection._place, _local.item
        if place and place.posted:
            return client().call(place.after_posted(head), body, meanwhile=place.settle, **more)
        try:
            if item and item.may_go_ahead(route_of(head) if len(body) <= CHUNK else None):
                return item.lane.client.call(dict(head, lane=item.lane.name), body, meanwhile=item.sent, **more)
        except (NotConnected, LinkLost):
            item.lane.ahead = 1
            raise
        return client().call(head, body, **more)

    # As often, and with the same pauses, as the stock ssh plugin tries it.
    def connect_all(self, account, interpreter):
        retries = int(self.option('reconnection_retries') or 0)
        for attempt in range(retries + 1):
            try:
                return self.connect_once(account, interpreter)
            except AnsibleConnectionFailure as e:
                if attempt == retries or isinstance(e, AnsibleAuthenticationFailure):
                    raise
                time.sleep(min(2 ** attempt - 1, 30))

    def connect_once(self, account, interpreter):
        if self.way:
            self.way.open()
        wanted = interpreter.words if interpreter else []
        for plan in account:
            hello = self.open(plan, wanted)
        if interpreter and not is_interpreter(hello, wanted):
            self.open(interpreter, wanted)

    # What has failed before is not tried once more where it must fail again. A Python may have come meanwhile: a module
    # is worth a look, a command can be run without one.
    def open(self, plan, wanted):
        candidates = (wanted if len(wanted) == 1 else []) + python_names()
        believed = [NO_PIPE] + [NO_PYTHON] * (not wanted) + ['timeout'] * ('timeout' not in plan.unreachable)
        most = None if plan.what == 'login' else self.option('mitogen_single_max_agents')
        try:
            hello = _hellos[plan.key] = client().open(plan, candidates, believed, most)
            return hello
        except LoginRefused as e:
            raise AnsibleAuthenticationFailure('%s: %s' % (self.where(), e))
        except BecomeRefused as e:
            raise AnsibleError(str(e))
        except BecomeEnded:
            raise
        except HopFailed as e:
            if e.end not in plan.unreachable:
                raise NoAgent('%s: %s' % (plan.what, e), plan.what)
            if e.end == 255:
                raise AnsibleConnectionFailure('Failed to connect to the host via ssh: %s' % e.head['stderr'].rstrip())
            raise AnsibleConnectionFailure('%s: %s' % (self.where(), e))

    # None where there is no agent to ask.
    def home(self, escalated, interpreter):
        try:
            account = self.account(escalated)
            if account[-1].key not in _hellos:
                self.connect_all(account, interpreter and interpreter_plan(account[-1], interpreter, self.silence))
            return _hellos[account[-1].key]['home']
        except (NoAgent, BecomeEnded):
            return None

    def where(self):
        return '%s@%s' % (self.context.remote_user or '', self.context.remote_addr)


# A file that is written here as it comes, with the two hashes of it that fetch returns: 1.3 s for 512 MiB once it is
# here, next to nothing while a worker waits for the next piece.
class FetchedFile:
    HASHES = dict(secure_hash=hashlib.sha1, md5=hashlib.md5)    # by the names of Ansible's functions

    def __init__(self, path):
        self.path = path
        self.file = open(to_bytes(path, errors='surrogate_or_strict'), 'wb')
        self.hashes = {}
        for name, new in self.HASHES.items():
            with contextlib.suppress(ValueError):       # a system whose rules forbid it
                self.hashes[name] = new()

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        self.file.close()
        self.state = None if kind else self.state_now()

    def write(self, data):
        self.file.write(data)
        for digest in self.hashes.values():
            digest.update(data)

    def state_now(self):
        found = os.stat(self.file.name)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    # None for what was not worked out, or is not the same file any more.
    def hashed_by(self, name):
        with contextlib.suppress(OSError):
            if name in self.hashes and self.state == self.state_now():
                return self.hashes[name].hexdigest()


# ---- by way of other hosts
# A host may be reached from another one of the inventory: an agent there starts the program that leads on. Files of
# keys and known hosts are then those of that machine.


@dataclasses.dataclass
class Way:
    via: str                # as the user calls it
    carrier: Carrier        # to the last host on the way
    account: list           # the Plans that lead to the account there

    def open(self):
        try:
            self.carrier.connect_all(self.account, None)
        except (NoAgent, HopFailed, AnsibleError) as e:
            raise AnsibleConnectionFailure('on the way by %s: %s' % (self.via, e))


# None where there is nothing between us and the host.
def way_to(connection):
    via = connection._options.get('mitogen_single_via')
    if via and not connection._way:
        method, user, name = re.fullmatch(r'(?:(?:([^:@]+):)?([^@]*)@)?(.+)', via).groups()
        if not connection._hostvars or name not in connection._hostvars:
            raise AnsibleConnectionFailure('no way by %s: there is no such host in the inventory' % via)
        if name in connection._passed:
            raise AnsibleConnectionFailure('no way by %s: it leads in a circle' % via)
        carrier = Carrier(connection_on_the_way(connection, method, user, name))
        connection._way = Way(via, carrier, carrier.account(bool(method)))
    return connection._way


def names_a_way(variables):
    return any(row['name'] in variables for row in settings()['via']['vars'])


# As a task for that host would have it.
def connection_on_the_way(behind, method, user, name):
    variables = behind._hostvars[name]
    context = PlayContext()
    context.remote_addr = variables.get('ansible_host', name)
    connection = connection_loader.get(variables.get('ansible_connection', 'ssh'), context, new_stdin=None)
    if not isinstance(connection, AgentConnection):
        raise AnsibleConnectionFailure('no way by %s: there can be no agent' % name)
    connection.set_options(task_keys=typed('password'), var_options=options_of('connection', connection, variables),
                           direct={'remote_user': user} if user and not method else None)
    connection._hostvars, connection._passed = behind._hostvars, behind._passed + (name,)
    context.remote_user = connection._options.get('remote_user')
    if method:
        connection.set_become_plugin(become_on_the_way(method, user, variables))
    return connection


def become_on_the_way(method, user, variables):
    become = become_loader.get(method)
    if not become:
        raise AnsibleConnectionFailure('Invalid become method specified, could not find matching plugin: %s' % method)
    become.set_options(task_keys=typed('become_pass'), var_options=options_of('become', become, variables),
                       direct={'become_user': user})
    return become


_passwords = {}         # name of an option -> what the user typed for all hosts


# When a play starts: tasks see a PlayContext in which their host's own variables count more.
def note_passwords(play_context):
    _passwords.update(password=play_context.password, become_pass=play_context.become_pass)


def typed(option):
    return {option: _passwords[option]} if _passwords.get(option) else {}


# The variables that a plugin's options are made from.
def options_of(kind, plugin, variables):
    names = C.config.get_plugin_vars(kind, plugin._load_name)
    return {name: variables[name] for name in names if name in variables}


_hellos = {}            # key of an agent -> what it said of itself when this process last opened the way to it
_identities = {}        # what decides over a login -> the command line for it


# To ask the plugin takes 1.5 ms. So it is asked once for what it cannot but answer alike.
def identity_of(connection):
    context = connection._play_context
    known = (type(connection), repr(connection._options), context.remote_addr, context.remote_user, context.port,
             context.password, context.private_key_file, context.timeout, context.executable)
    if known not in _identities:
        argv, cwd, env = connection.agent_argv(PLACEHOLDER)
        _identities[known] = [content_of(word) for word in argv], cwd, env
    return _identities[known]


# A file that a plugin writes for the one command, say a kubeconfig, has another name each time. It stays until the end
# of the run, since nobody calls back those who would remove it.
@contextlib.contextmanager
def temporary_files_in(folder):
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def content_of(word):
    if not word.startswith(C.DEFAULT_LOCAL_TMP + '/'):
        return word
    with open(word, 'rb') as file:
        return hashlib.sha1(file.read()).hexdigest()


# Where Ansible looks for a Python when it is told nothing.
def python_names():
    return list(C.config.get_config_value('INTERPRETER_PYTHON_FALLBACK'))


RACE_GUARD = ' && sleep 0'      # up to ansible-core 2.20 Ansible appends it, against a race in ssh that we do not run

# What Ansible's become plugin made of a command. The text is the real one: whoever else asked for it can use it.
@dataclasses.dataclass
class Escalation:
    plain: str
    wrapped: str


# A command line as it reaches exec_command, taken apart: the shell, what it is to run, whether in the become account.
class Command:
    def __init__(self, text, escalation, executable):
        shell = executable + ' -c ' if executable else ''
        tails = [quote(escalation.wrapped + guard) for guard in (RACE_GUARD, '') for quote in (shlex.quote, str)
                 ] if escalation else []
        tail = next((tail for tail in tails if text.endswith(tail)), None)
        self.escalated = tail is not None
        if self.escalated:
            self.plain, shell = escalation.plain, text[:-len(tail)]
        elif shell and text.startswith(shell):
            self.plain = shlex.split(text[len(shell):])[0].removesuffix(RACE_GUARD)
        else:
            self.plain, shell = text, ''
        if self.escalated and not shell:
            shell = '/bin/sh -c'
        self.argv = shlex.split(shell) + [self.plain] if shell else None

    # The interpreter that a module is piped to, as words, and the environment in front of it.
    def interpreter(self):
        words = shlex.split(self.plain)
        env = {}
        while words and re.match(r'[A-Za-z_]\w*=', words[0]):
            name, value = words.pop(0).split('=', 1)
            env[name] = value
        return words, env


# What Python, and the loader in front of it, look at when a process starts, and never again: PYTHONPATH and
# LD_LIBRARY_PATH come too late for an agent that runs already. So there is another one for such an environment.
# -> the words to start it with, the rest of the environment
def at_start(env):
    early = [name for name in sorted(env) if re.match('PYTHON|LD_|GLIBC_|LC_|(LANG|TZ|HOME)$', name)]
    words = ['env'] * bool(early) + ['%s=%s' % (name, env[name]) for name in early]
    return words, {name: value for name, value in env.items() if name not in early}


# What changes how processes begin: those of accounts that are become, and all. sshd reads the first files once for a
# connection, whatever the number of its sessions. Of a folder for packages Python takes notice when it starts, if it
# is there by then; older C libraries read nsswitch.conf once.
SESSION_BEGINS = re.compile(rb'/etc/(environment|default/locale|security/|pam\.|login\.defs|sudoers)|'
                            rb'/\.pam_environment|usermod|gpasswd|adduser')
LOGIN_BEGINS = re.compile(rb'/etc/(bash|zsh|csh|fish|profile|nsswitch)|pip[\d.]* install|upgrade|'
                          rb'/\.(bash|zsh|t?csh|profile|config/fish|ssh/(environment|rc))')


PACKAGE_MANAGERS = 'apt', 'dnf', 'dnf5', 'yum', 'package', 'zypper', 'pacman', 'apk'


# Whether another Python may be in the place of the agent's, or look for modules in a place that was not there before.
def changes_python(module, output):
    kind = module.fqn.rpartition('.')[2]
    return kind == 'pip' or kind in PACKAGE_MANAGERS and b'python' in module.params + output


# Which account a module is to change, and how. -> name or None, arguments
def account_in(module):
    if not module.fqn.endswith('.user'):
        return None, {}
    given = json.loads(module.params)['ANSIBLE_MODULE_ARGS']
    return str(given.get('name') or given.get('user')), given


# ---- the temporary directory of a task
# Stock Ansible makes, fills, opens up and removes it by a command each: six round trips for a copy, two of which remain
# here. Its name is known beforehand; the agent of the account that will read it makes it when a request comes that
# names it; small files go there in front of the request that needs them; and nobody waits for its end.


@dataclasses.dataclass
class Place:
    path: str               # without a slash at its end
    escalated: bool         # it belongs to the become account
    is_made: bool = False   # a request was sent that has it made
    posted: list = dataclasses.field(default_factory=list)      # (Client, request, path) of files on their way
    route: list = None      # where they go
    modules: dict = dataclasses.field(default_factory=dict)     # path -> Payload that Ansible takes for a file there

    def post(self, head, body):
        if self.posted and self.route != route_of(head):
            self.settle()
        self.route = route_of(head)
        line = client()
        self.posted.append((line, line.post(dict(head, lane=self.path), body), head['path']))

    # The head of a request that is to follow them.
    def after_posted(self, head):
        if self.route == route_of(head):
            return dict(head, lane=self.path)
        self.settle()
        return head

    def settle(self):
        posted, self.posted = self.posted, []
        for client, request, path in posted:
            try:
                client.settle(request)
            except NotConnected as e:
                raise LinkLost(str(e))
            except LinkLost:
                raise
            except CallFailed as e:
                raise AnsibleError('failed to transfer file to %s:\n\n%s' % (path, e))


# Which agent a request reaches.
def route_of(head):
    return head['to'] + [head['interpreter']]


def making_tmp_path(make_tmp_path):
    def patched_make(action, remote_user=None):
        place = place_for(action)
        if not place:
            return make_tmp_path(action, remote_user)
        action._cleanup_remote_tmp = True
        action._connection._place = place
        action._connection._shell.tmpdir = place.path + '/'
        return place.path + '/'
    return patched_make


# None where Ansible is to do it: where no agent is, for files that somebody wants to see, for a path that only a shell
# can tell.
def place_for(action):
    connection = action._connection
    if (not has_own_files(connection) or connection._wants_files or C.DEFAULT_KEEP_REMOTE_FILES
            or source_of(type(action)) not in REVIEWED):
        return None
    base = action.get_shell_option('remote_tmp', default='~/.ansible/tmp').rstrip('/')
    if action._is_become_unprivileged():
        shared = action.get_shell_option('system_tmpdirs', default=['/var/tmp', '/tmp'])
        base = base if base in shared else shared[0].rstrip('/')
    name, slash, rest = base.partition('/')
    home = home_for(action, becomes(action))
    folder = '%s/%s' % (home if name == '~' else name, rest)
    if home is not None and re.fullmatch(r'(/[\w.@%+=:,-]+)+', folder):
        return Place('%s/%s' % (folder, connection._shell._generate_temp_dir_name()), becomes(action))


def has_own_files(connection):
    return is_carried(connection) and leads_away(identity_of(connection))


# The question that Ansible asks before each command.
def becomes(action):
    wanted, user = action.get_become_option('become_user'), action._get_remote_user()
    return bool(action._connection.become and (C.BECOME_ALLOW_SAME_USER or wanted != user or not (wanted or user)))


# Its agent may not be there yet: where the interpreter is known, let it be that one.
def home_for(action, escalated):
    interpreter = action._templar.available_variables.get('ansible_python_interpreter')
    is_path = isinstance(interpreter, str) and re.fullmatch(r'/[\w./+-]+', interpreter)
    return Carrier(action._connection).home(escalated, [str(interpreter)] if is_path else None)


def removing_tmp_path(remove_tmp_path):
    def patched_remove(action, tmp_path, force=False):
        connection = action._connection
        place = getattr(connection, '_place', None)
        if not place or (tmp_path or connection._shell.tmpdir) != place.path + '/':
            return remove_tmp_path(action, tmp_path, force=force)
        if force or action._should_remove_tmp_path(place.path + '/'):
            if place.is_made:
                carrier = Carrier(connection)
                head = carrier.addressed(carrier.account(place.escalated), connection._interpreter, {})
                client().tell(dict(head, call='remove', tmpdir=None, path=place.path))
            connection._place = connection._shell.tmpdir = None
    return patched_remove


# Whoever reads the files is their owner already.
def fixing_perms(fixup_perms2):
    def patched_fixup(action, remote_paths, remote_user=None, execute=True):
        place = getattr(action._connection, '_place', None)
        if place and all((path + '/').startswith(place.path + '/') for path in remote_paths):
            return remote_paths
        return fixup_perms2(action, remote_paths, remote_user, execute)
    return patched_fixup


def expanding_user(expand_user):
    def patched_expand(action, path, sudoable=True, pathsep=None):
        home = None
        if path.split('/')[0] == '~' and has_own_files(action._connection):
            home = home_for(action, sudoable and becomes(action))
        return home + path[1:] if home else expand_user(action, path, sudoable, pathsep)
    return patched_expand


# 6 PAYLOADS ##########################################################################################################
# Ansible's module builder finds all files that a module needs, zips them, and wraps the zip and the parameters into a
# Python text. We let it, with another class in the place of ZipFile: what it takes for the zip is the hash of a table
# of contents. So each version of Ansible decides for itself what belongs into a module. A task adds its parameters,
# which takes 0.4 ms; base64 and repr of 130 kB took 3.

COMPRESSION = 'MITOGEN_SINGLE'      # the name under which the builder files such modules in its cache


# Modules that may follow each other in one process: they import nothing but basic.py and the standard library, start no
# threads, and change in their process what §18 undoes, and no more. For a process of its own each would pay 8 ms of
# CPU, most of them to the kernel, for the 1,100 pages that it writes to.
REVIEWED_MODULES = {'ansible.modules.' + name for name in
                    ('blockinfile', 'command', 'copy', 'file', 'lineinfile', 'ping', 'replace', 'slurp', 'stat')}


class Payload(bytes):
    toc: str                # hash of the table of contents
    fqn: str                # the module's full name
    params: bytes           # its parameters, as Ansible encoded them
    profile: str            # how they and the result are encoded; '' before ansible-core 2.19
    rlimit: int             # RLIMIT_NOFILE for it, or 0
    real_bytes: object      # () -> what Ansible would have sent without us
    rebuild: object         # () -> the same Payload, its sources offered to the broker once more
    started: object = None  # the Payload that it starts and does not wait for

    # Whether the next one may follow in the same process.
    def leaves_nothing(self):
        return self.fqn in REVIEWED_MODULES and not self.rlimit

    def head(self):
        return dict(call='run', toc=self.toc, fqn=self.fqn, profile=self.profile, rlimit=self.rlimit)


# A module that no agent can run has not begun to: it is run once more, and this time all of it is up to stock Ansible.
def preferring_agents(execute_module):
    def patched_execute(action, *args, **kwargs):
        if action._task.action.endswith('synchronize') and names_a_way(kwargs.get('task_vars') or {}):
            raise AnsibleError('synchronize starts an ssh of its own, which cannot go by way of mitogen_via')
        try:
            with payloads(is_carried(action._connection)):
                return execute_module(action, *args, **kwargs)
        except NoAgent as e:
            reason = e
        refuse(action._connection, reason)
        try:
            return execute_module(action, *args, **kwargs)
        except AnsibleConnectionFailure as e:
            raise AnsibleConnectionFailure('%s: %s' % (reason, e))
    return patched_execute


RECALLED = 'recalled'       # nothing but what an earlier run has found


# Whether what is built here is one, or RECALLED.
@contextlib.contextmanager
def payloads(wanted):
    before = _local.building
    _local.building = wanted
    try:
        yield
    finally:
        _local.building = before


def making_payloads(modify_module):
    def patched_modify(*args, **kwargs):
        if not _local.building:
            return modify_module(*args, **kwargs)

        def build():
            with baton.uncounted():
                return modify_module(*args, **dict(kwargs, module_compression=COMPRESSION))

        def real_bytes():
            return module_bytes(modify_module(*args, **kwargs))

        def rebuild():
            forget_catalogues()
            return module_bytes(with_payload(build(), real_bytes, rebuild))

        return with_payload(build(), real_bytes, rebuild)
    return patched_modify


# The builder's cache for this run: what is filed there was offered to a broker that is no more.
def forget_catalogues():
    for entry in os.scandir(os.path.join(C.DEFAULT_LOCAL_TMP, 'ansiballz_cache')):
        if COMPRESSION in entry.name:
            os.unlink(entry.path)


# What modify_module returns is a tuple up to ansible-core 2.18, a dataclass since.
def module_bytes(built):
    return built[0] if isinstance(built, tuple) else built.b_module_data


def with_payload(built, real_bytes, rebuild):
    data = module_bytes(built)
    if TOC_MARK not in data:
        return built            # not a Python module: nothing of it was catalogued
    found = parse_wrapper(data.decode())
    payload = Payload(data) if found else real_bytes()
    if found:
        vars(payload).update(found, real_bytes=real_bytes, rebuild=rebuild)
    if isinstance(built, tuple):
        return (payload,) + built[1:]
    return dataclasses.replace(built, b_module_data=payload)


literal_once = functools.lru_cache(maxsize=500)(ast.literal_eval)      # not for parameters, which may be secret


# The wrapper's own literals are the one place where all versions of Ansible tell what they encoded, and how: a line
# for each argument of its main function. None for a debugger or a coverage run, which want files on the target.
def parse_wrapper(text):
    _, found, tail = text.rpartition('    _ansiballz_main(\nansible_module=')
    if found:
        lines = dict(line.split('=', 1) for line in tail.splitlines() if '=' in line)
        value = {name: literal_once(lines[name].rstrip(',')) for name in
                 ('zip_data', 'module_fqn', 'profile', 'rlimit_nofile', 'extensions')}
        value['params'] = ast.literal_eval(lines['params'].rstrip(','))
    else:
        value = parse_legacy_wrapper(text)
    if value['extensions']:
        return None
    return dict(toc=base64.b64decode(value['zip_data']).decode().split(':')[1], fqn=value['module_fqn'],
                params=value['params'].encode(), profile=value['profile'], rlimit=value['rlimit_nofile'])


# Up to ansible-core 2.18.
def parse_legacy_wrapper(text):
    def literal(pattern, default=None):
        found = re.search(pattern, text, re.M)
        return ast.literal_eval(found.group(1)) if found else default

    return dict(zip_data=literal(r'^ +ZIPDATA = (.+)$'), params=literal(r'^ +ANSIBALLZ_PARAMS = (.+)$'), profile='',
                module_fqn=literal(r"run_module\(mod_name=('[^']+')"),
                rlimit_nofile=literal(r'min\(existing_hard, (\d+)\)', 0), extensions='import coverage' in text)


def transferring_real_bytes(transfer_data):
    def patched_transfer(action, remote_path, data):
        place = getattr(action._connection, '_place', None)
        if isinstance(data, Payload) and place and remote_path.startswith(place.path + '/'):
            place.modules[remote_path] = data
            return remote_path
        return transfer_data(action, remote_path, data.real_bytes() if isinstance(data, Payload) else data)
    return patched_transfer


def always_pipelining(is_pipelining_enabled):
    def patched_is_enabled(action, module_style, wrap_async=False):
        if is_carried(action._connection):
            return (module_style == 'new' and not wrap_async and not C.DEFAULT_KEEP_REMOTE_FILES
                    and not action._connection._wants_files)
        return is_pipelining_enabled(action, module_style, wrap_async)
    return patched_is_enabled


# The zipfile module as the module builder sees it.
def with_catalogue(original):
    namespace = types.SimpleNamespace(**{name: getattr(original, name) for name in original.__all__})
    namespace.ZipFile = catalogue_or_zip
    setattr(namespace, COMPRESSION, COMPRESSION)
    return namespace


def catalogue_or_zip(file, mode='r', compression=zipfile.ZIP_STORED, **kwargs):
    if compression == COMPRESSION:
        return Catalogue(file)
    return zipfile.ZipFile(file, mode=mode, compression=compression, **kwargs)


TOC_MARK = base64.b64encode(b'MITOGEN_SINGLE:')     # what stands in front of the hash, as it appears in the wrapper


# Takes what a ZipFile takes; writes a hash; offers the contents to the broker.
class Catalogue:
    compression = zipfile.ZIP_STORED        # asked for by whoever makes a ZipInfo for it

    def __init__(self, file):
        self.file = file
        self.members = {}

    def writestr(self, info, data):
        name = info if isinstance(info, str) else info.filename
        self.members[name] = data.encode() if isinstance(data, str) else bytes(data)

    def namelist(self):
        return list(self.members)

    def close(self):
        digests = {path: hashlib.sha1(data).hexdigest() for path, data in self.members.items()}
        toc = catalogued(digests, {digests[path]: data for path, data in self.members.items()})
        self.file.write(b'MITOGEN_SINGLE:' + toc.encode())


_tables = {}            # hash of a table of contents -> the table, of those that this process has offered


# -> hash of the table, once the broker has it and what it names
def catalogued(digests, texts):
    table = json.dumps(digests, sort_keys=True).encode()
    toc = hashlib.sha1(table).hexdigest()
    client().offer(toc, {toc: table, **texts})
    _tables[toc] = digests
    return toc


# ---- asynchronous tasks
# Ansible writes the module and its async_wrapper into files, and starts the one with the other: 400 ms of CPU on the
# target. For us they are no files. The agent runs the module of §20 instead, which starts both from RAM.

JOB = 'ansible.modules.mitogen_single_job'


# `words`: the command with which Ansible starts async_wrapper. -> (Payload, words of the interpreter)
def job_in(place, words):
    modules, place.modules = place.modules, {}
    start = next((n for n, word in enumerate(words) if word in modules), None)
    if start is None:
        raise NoAgent('a module was to be a file')
    wrapper = modules.pop(words[start])
    module = next((modules[word] for word in words[start:] if word in modules), None)
    try:
        return job_payload(wrapper, module, words[start:]), words[:start]
    except UnknownModule:
        return rebuilt_job(wrapper, module, words[start:]), words[:start]


# No `module`: that one is a file, and no Python, which async_wrapper starts as it does in stock Ansible.
def job_payload(wrapper, module, argv):
    payload, text = Payload(), job_source()
    name = hashlib.sha1(text).hexdigest()
    digests = {'%s.py' % JOB.replace('.', '/'): name}
    for part in filter(None, (wrapper, module)):
        if part.toc not in _tables:
            raise UnknownModule(part.toc)
        digests.update(_tables[part.toc])
    order = dict(argv=argv, wrapper=wrapper.fqn)
    if module:
        order.update(fqn=module.fqn, profile=module.profile, params=module.params.decode())
    vars(payload).update(
        toc=catalogued(digests, {name: text}), fqn=JOB, params=json.dumps(order).encode(), profile=wrapper.profile,
        rlimit=wrapper.rlimit, started=module, rebuild=functools.partial(rebuilt_job, wrapper, module, argv))
    return payload


def rebuilt_job(wrapper, module, argv):
    return job_payload(wrapper.rebuild(), module and module.rebuild(), argv)


# ---- what was found in an earlier run
# To find the files that a module needs takes Ansible 100 to 400 ms: it parses each of them for its imports. What it
# found is kept on this machine, as a list of paths and hashes of what was there, and read back in 2 ms. It counts as
# long as Ansible would find the same: the module and all those files have the same text, read now from where they are;
# Ansible looks in the same places; and there are the same names in these, so that nothing hides a file that it did not
# hide before. Times of files prove nothing, and are not asked. What is kept is data: sent to targets, never run here.

CACHE_FILES = 1000      # one for a module, its text and the search path; a cache that holds more starts anew
SEARCHED_FILES = 5000   # names that are worth a look for one module (1 ms for 1500): a search path may lead to anything
UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)    # of a cache: do without


def finding_once(recursive_finder):
    def patched_finder(name, fqn, source, archive, *more):
        find = functools.partial(recursive_finder, name, fqn, source, archive, *more)
        if not isinstance(archive, Catalogue) or display.verbosity > 2 or any(map(extends, more)):
            return find()       # from -vvv on Ansible tells what it looks for
        try:
            archive.members.update(recalled(entry_name(fqn, source)))
        except UNUSABLE:
            if _local.building == RECALLED:
                raise
            return found_and_kept(find, fqn, source, archive)
        return plain_metadata()
    return patched_finder


# Coverage or a debugger, since ansible-core 2.19: it brings files of its own.
def extends(argument):
    return getattr(argument, 'extension_names', ())


# What recursive_finder returns for every module, but for experiments: nothing up to ansible-core 2.18.
def plain_metadata():
    return getattr(module_common, '_DEFAULT_LEGACY_METADATA', None)


# All that decides over the files of a module before any of them is looked for.
def entry_name(fqn, source):
    return digest_of([builder_version(), search_path(), fqn, hashlib.sha1(source).hexdigest()])


def digest_of(value):
    return hashlib.sha1(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@functools.lru_cache(maxsize=None)
def builder_version():
    texts = [hashlib.sha1(read_file(path)).hexdigest() for path in (module_common.__file__, __file__)]
    return [module_common.__version__, sys.version, os.environ.get('_ANSIBLE_MODULE_METADATA'), texts]


def search_path():
    return module_utils_loader._get_paths(subdirs=False) + [module_common._MODULE_UTILS_PATH]


def read_file(path):
    with open(path, 'rb') as file:
        return file.read()


def recalled(name):
    with cache_directory() as directory, open_private(name, directory) as file:
        entry = json.load(file)
    if not is_current(entry):
        raise LookupError('Ansible may find other files now')
    return {path: read_member(*member) for path, member in entry['members'].items()}


def is_current(entry):
    return entry['names'] == names_on_search_path() and all(
        state == collection_state(name) for name, state in entry['collections'].items())


def read_member(place, content):
    if place is None:
        return content.encode()
    data = read_file(place)
    if hashlib.sha1(data).hexdigest() != content:
        raise LookupError('%s has changed' % place)
    return data


# What becomes of a build that is watched. What changed while Ansible was looking is not kept.
def found_and_kept(find, fqn, source, archive):
    watch = Watch()
    with replaced(watch.observers()):
        metadata = find()
    if metadata == plain_metadata() and not watch.doubts:
        with contextlib.suppress(*UNUSABLE):
            entry = dict(names=watch.names, collections=watch.collections,
                         members={path: reference(path, data) for path, data in archive.members.items()})
            if is_current(entry):
                keep(entry_name(fqn, source), entry)
    return metadata


# Listens to Ansible while it looks for files. Which collections did it ask for, be they there or not? And did it, or
# Python, have anything to say to the user? Then it shall say so in each run.
class Watch:
    def __init__(self):
        self.doubts = []                    # why not to keep what it finds
        self.collections = {}               # name -> state, before any of its files was looked for
        self.names = self.noted(names_on_search_path)

    def noted(self, ask, *args):
        try:
            return ask(*args)
        except UNUSABLE as e:
            self.doubts.append(e)

    def observers(self):
        return ((module_common, '_get_collection_metadata', self.noting_collections),
                (module_common, 'display', self.noting_messages),
                (warnings, 'showwarning', self.noting_calls))

    def noting_collections(self, get_metadata):
        def patched_get(name):
            if name not in self.collections:
                self.collections[name] = self.noted(collection_state, name)
            return get_metadata(name)
        return patched_get

    def noting_messages(self, original):
        speech = {name: self.noting_calls(getattr(original, name)) for name in ('warning', 'deprecated')}
        return types.SimpleNamespace(debug=original.debug, vvv=original.vvv, vvvvv=original.vvvvv, **speech)

    def noting_calls(self, function):
        def patched_function(*args, **kwargs):
            self.doubts.append(args)
            return function(*args, **kwargs)
        return patched_function


def names_on_search_path():
    return digest_of([importable(path) for path in dict.fromkeys(map(os.path.realpath, search_path()))])


# Where a collection is, what it redirects, and the names of its module_utils; None where there is none.
def collection_state(name):
    try:
        routing = _collection_finder._get_collection_metadata(name).get('plugin_routing') or {}
    except ValueError:
        return None
    home = collection_home(name)
    return digest_of([home, routing.get('module_utils'), importable(os.path.join(home, 'plugins', 'module_utils'))])


def collection_home(name):
    return os.path.dirname(sys.modules['ansible_collections.' + name].__file__)


# All files and directories below a directory that an import could find.
def importable(root):
    files, places = [], [root] if os.path.isdir(root) else []
    for place in places:        # which grows on the way
        for entry in os.scandir(place):
            if entry.is_dir() and entry.name != '__pycache__':
                places.append(entry.path)
            elif entry.is_file():
                files.append(entry.path)
        if len(places) + len(files) > SEARCHED_FILES:
            raise ValueError('too many files in %s' % root)
    return sorted(places) + sorted(files)


# Where the text of a member is, and its hash; no place, and the text, for what Ansible itself wrote: packages that
# are empty or only lead elsewhere. Whatever else there is comes from a place that we do not know.
def reference(path, data):
    places = places_of(path)
    for place in places:
        if os.path.isfile(place) and read_file(place) == data:
            return place, hashlib.sha1(data).hexdigest()
    if any(map(os.path.lexists, places)) or not path.endswith('/__init__.py'):
        raise LookupError('where does %s come from?' % path)
    return None, data.decode()


# Ansible writes the packages down to module_utils; what is below has files.
def places_of(path):
    package, found, rest = path.partition('/module_utils/')
    if not found or rest == '__init__.py':
        return []
    if package == 'ansible':
        return [os.path.join(root, rest) for root in search_path()]
    _, namespace, name, _ = package.split('/')
    return [os.path.join(collection_home('%s.%s' % (namespace, name)), 'plugins', 'module_utils', rest)]


# A directory of ours alone: whoever could write there would decide what runs as root on all targets.
@contextlib.contextmanager
def cache_directory():
    path = os.path.join(C.ANSIBLE_HOME, 'mitogen_single_cache')
    os.makedirs(path, 0o700, exist_ok=True)
    directory = private_fd(path, os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)


def open_private(name, directory, mode='r'):
    return open(name, mode, opener=lambda path, flags: private_fd(path, flags, directory))


def private_fd(path, flags, directory=None):
    fd = os.open(path, flags | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(fd)
        raise PermissionError('%s is not ours alone' % path)
    return fd


# Complete or not at all, and of two runs the one that comes last.
def keep(name, entry):
    with cache_directory() as directory:
        kept = os.listdir(directory)
        for old in kept if len(kept) >= CACHE_FILES else ():
            os.unlink(old, dir_fd=directory)
        draft = '%s.%s' % (name, os.urandom(8).hex())
        with open_private(draft, directory, 'x') as file:
            file.write(json.dumps(entry))
        os.replace(draft, name, src_dir_fd=directory, dst_dir_fd=directory)


# ---- what later tasks will need
# A module's sources are 5 to 60 kB: over a slow link its first task would wait for them. So the broker is told what the
# tasks of a play name, while the main thread waits for the first login, and sends it behind what is asked for now. Only
# what an earlier run has found: that takes 7 ms a module, which its task need not spend any more; the search 150.

# The modules behind actions that run the same ones on every host.
MODULES_OF = {'ansible.plugins.action.' + action: ['ansible.legacy.' + name for name in names.split()]
              for action, names in dict(command='command', shell='command', copy='stat copy file', fetch='stat slurp',
                                        gather_facts='setup', template='stat copy file', unarchive='stat unarchive',
                                        uri='uri').items()}


# A step for each module.
def foreseeing(blocks):
    tables, seen = [], set()
    for task in tasks_in(blocks):
        for name in modules_of(task):
            if name not in seen and display.verbosity < 3:      # from there on Ansible tells what it builds
                seen.add(name)
                tables += foreseen(*name)
                with contextlib.suppress(LinkLost, OSError):    # which the next task reports, if it lasts
                    client().tell(dict(call='expect', tables=tables))
                yield True


def tasks_in(blocks):
    for block in blocks:
        if isinstance(block, Block):
            yield from tasks_in(block.block + block.rescue + block.always)
        else:
            yield block


# (name, collections to look in) of each. Whatever is wrong with an action or a module is for its task to say, if that
# is ever run.
def modules_of(task):
    with contextlib.suppress(Exception):
        action = action_of(task)
        names = MODULES_OF.get(action, [task.action] if action == 'ansible.plugins.action.normal' else [])
        return [(name, tuple(task.collections or ())) for name in names]
    return []


# The hash of a module's table of contents, once the broker has all of it; nothing for what cannot be told in advance.
def foreseen(name, collections):
    with contextlib.suppress(Exception), payloads(RECALLED):
        path = module_loader.find_plugin(name, '.py', collection_list=list(collections))
        built = action_plugins.modify_module(module_name=name, module_path=path, module_args={}, templar=Templar(None),
                                             task_vars=dict(ansible_python_interpreter='/usr/bin/python3'))
        return [module_bytes(built).toc]
    return []


# 7 CLIENT ############################################################################################################
# A worker's end of the broker's socket. Everything here blocks, one request at a time. What is raised says what to do
# about it; §5 says it in Ansible's terms.


class CallFailed(Exception):
    """The agent could not do it: the text says why."""


class NotConnected(CallFailed):
    """There is no such agent yet, or no more."""


class UnknownModule(CallFailed):
    """The broker does not have the sources; build the module again."""


class NoDirectory(CallFailed):
    """The agent could not make the directory for temporary files."""


class LinkLost(CallFailed):
    """The agent, or the way to it, went away while it worked on the request."""


class NoAgent(Exception):
    """The account is there, but no agent can be: no Python, say."""

    def __init__(self, text, step=None):
        super().__init__(text)
        self.step = step or text


class HopFailed(Exception):
    def __init__(self, head):
        said = [str(head.get(name) or '').strip() for name in ('text', 'tty', 'stdout', 'stderr')]
        super().__init__(': '.join(text for text in said if text))
        self.head = head
        self.end = end_of(head)


# How a program that did not become an agent ended: its exit code, or what was done to it.
def end_of(head):
    return head.get('code') if head.get('kind') == 'exit' else head.get('kind')


class LoginRefused(Exception):
    pass


class BecomeRefused(Exception):
    pass


class BecomeEnded(HopFailed):
    """The become program went away without having become anybody: what it printed is the answer."""


FAILURES = {'closed': NotConnected, 'toc': UnknownModule, 'lost': LinkLost, 'tmpdir': NoDirectory}


_idle = []                      # clients of worker threads that have ended


# One for each thread of each process: a forked worker must not use its parent's.
def client():
    mine = _local.client
    if not mine or not mine.is_usable():
        idle = [other for other in _idle if other.is_usable()]
        mine = _local.client = idle.pop() if idle else Client(door())
        _idle[:] = idle
        worker = _local.worker
        if worker:
            worker.clients.add(mine)
    return mine


# A thread of a worker ends: its client serves the next one.
def keep_client(worker):
    mine = _local.client
    worker.clients.discard(mine)
    if mine and mine.sock:
        _idle.append(mine)


class Client:
    def __init__(self, door):
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(None)              # whatever some plugin made the default
        self.pid = os.getpid()
        self.outbox = b''
        self.numbers = itertools.count(1)       # of requests
        self.frames = {}                        # request -> frames of it that came before somebody waited for them
        with theirs:
            try:
                socket.send_fds(door, [b'c'], [theirs.fileno()])
            except OSError as e:
                raise LinkLost('the broker is gone (%s)' % e)

    # head['to']: keys of agents, the first that is there and has the interpreter gets the call. on_data(channel, bytes)
    # takes what comes before the reply. `source`: a file to stream behind the request; `target`: a file for what comes
    # back. meanwhile() is called when the request is on its way: requests of other threads may follow, each of which
    # has to wait for its turn to read.
    def call(self, head, body=b'', on_data=None, source=None, target=None, meanwhile=None):
        with self.asking() as request:
            more = len(body) > CHUNK or source is not None
            self.send(CALL, request, pack(dict(head, more=more), body[:CHUNK]))
            for at in range(CHUNK, len(body), CHUNK):
                self.send(DATA, request, b'\0' + body[at:at + CHUNK])
            if more and source is None:
                self.send(END, request)
            if meanwhile:
                self.flush()
                meanwhile()
            if source is None and target is None:
                return self.reply(request, on_data)
            with self.without_baton():
                return self.get(request, target) if source is None else self.put(request, source, head['squeeze'])

    # A request whose answer is read by settle(). It leaves together with what is asked next.
    def post(self, head, body):
        request = next(self.numbers)
        self.frames[request] = collections.deque()
        self.send(CALL, request, pack(dict(head, more=False), body))
        return request

    def settle(self, request):
        with self.asking(request):
            return self.reply(request)

    # A request whose answer nobody waits for.
    def tell(self, head):
        self.send(CALL, next(self.numbers), pack(head))
        self.flush()

    # A file may take minutes, in which no code of Ansible's runs here. Items of a loop share a client, which is theirs
    # only as long as they have the baton.
    @contextlib.contextmanager
    def without_baton(self):
        if _local.item:
            yield
        else:
            with baton.passed_on(), baton.kept():
                yield

    def put(self, request, source, squeeze):
        source.seek(0)
        sender = Sender(source, squeeze, lambda kind, payload: self.send(kind, request, payload),
                        lambda: self.send(END, request))
        sender.more()
        return self.reply(request, on_ack=sender.taken)

    def get(self, request, target):
        def write(channel, data):
            target.write(unpacked(channel, data))
            self.send(ACK, request)

        return self.reply(request, write)

    def reply(self, request, on_data=None, on_ack=None):
        while True:
            kind, payload = self.receive(request)
            if kind == REPLY:
                return unpack(payload)[0]
            if kind == FAIL:
                head = unpack(payload)[0]
                raise FAILURES.get(head['kind'], CallFailed)(head['text'])
            if kind == ACK:
                on_ack()
            elif kind == DATA:
                on_data(payload[0], memoryview(payload)[1:])

    # Start the agent of a plan, or wait until somebody else has. Its program may ask: the dialogue knows what to say.
    # `believed`: what need not be tried again if it has ended so before. `most`: agents that are kept beside it; None
    # for a login.
    def open(self, plan, candidates, believed, most):
        dialogue = plan.dialogue()
        with self.asking() as request:
            self.send(CALL, request, pack(dict(call='open', key=plan.key, parent=plan.parent, believed=believed,
                                               most=most, spec=plan.spec(candidates))))
            while True:
                kind, payload = self.receive(request)
                if kind == REPLY:
                    return unpack(payload)[0]
                if kind == FAIL:
                    dialogue.failed(unpack(payload)[0])
                if kind == DATA:
                    channel, answer = dialogue.hear(payload[0], payload[1:])
                    if answer is not None:
                        self.send(DATA, request, bytes([channel]) + answer)

    # Called from within Ansible's module builder, which holds a lock on a file: the baton is not passed on, or another
    # worker would take it and wait for that lock for ever. Of a module's 60 blobs the broker has most from another one.
    def offer(self, toc, blobs):
        with self.asking() as request, baton.kept():
            missing = [toc]
            while missing:
                for name in missing:
                    if name not in blobs:
                        raise UnknownModule(name)
                    self.send(BLOBS, request, pack_blobs([(bytes.fromhex(name), blobs[name])]))
                self.send(CALL, request, pack(dict(call='offer', toc=toc)))
                missing = unpack(self.receive(request)[1])[0]['missing']

    # Whether nobody has said this before in this run.
    def is_first(self, text):
        with self.asking() as request:
            self.send(CALL, request, pack(dict(call='first', text=text)))
            return unpack(self.receive(request)[1])[0]['first']

    # What ends links. It is done when this returns. head: call (drop, renew) and what that takes, see Broker.
    def order(self, **head):
        with self.asking() as request:
            self.send(CALL, request, pack(head))
            self.receive(request)

    # A request that is given up halfway leaves frames behind that belong to nobody: the line is closed, which also
    # tells the broker to give it up. What cannot be an answer comes from a target that is broken or hostile.
    @contextlib.contextmanager
    def asking(self, posted=None):
        request = posted or next(self.numbers)
        self.frames.setdefault(request, collections.deque())
        try:
            yield request
        except CallFailed as e:
            if isinstance(e, BrokerGone):
                self.close()
            raise
        except (ProtocolError, LookupError, TypeError, RecursionError, zlib.error) as e:
            self.close()
            raise LinkLost('malformed answer (%s)' % describe(e))
        except BaseException:
            self.close()
            raise
        finally:
            del self.frames[request]

    def close(self):
        if self.sock:
            self.sock.close()
            self.sock = None

    # Ours, and the broker at the other end has not died meanwhile.
    def is_usable(self):
        try:
            return self.pid == os.getpid() and self.sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b''
        except BlockingIOError:
            return True
        except (OSError, AttributeError):
            return False

    # From another thread: whatever this client waits for ends at once.
    def shut(self):
        with contextlib.suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)

    # What is sent before we wait for something leaves in one piece, here and on its way to the target.
    def send(self, kind, request, payload=b''):
        self.outbox += HEADER.pack(kind, 0, 0, request, len(payload)) + payload
        if len(self.outbox) > CHUNK:
            self.flush()

    def flush(self):
        data, self.outbox = self.outbox, b''
        try:
            self.sock.sendall(data)
        except (OSError, AttributeError) as e:
            baton.leave_if_ended()
            raise BrokerGone('the broker is gone (%s)' % e)

    # The next frame of this request; what came for one that was given up is dropped.
    def receive(self, request):
        if self.outbox:
            self.flush()
        while not self.frames[request]:
            kind, _, _, asked, size = HEADER.unpack(self.read(HEADER.size))
            payload = self.read(size)
            if asked in self.frames:
                self.frames[asked].append((kind, payload))
        return self.frames[request].popleft()

    def read(self, size):
        parts = []
        while size:
            parts.append(self.wait(size))
            size -= len(parts[-1])
        return b''.join(parts)

    # The one place where a worker waits for the outside world.
    def wait(self, size):
        data = b''
        with contextlib.suppress(OSError, AttributeError):      # it was closed
            try:
                data = self.sock.recv(size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                with baton.passed_on():
                    data = self.sock.recv(size, socket.MSG_WAITALL)
        if not data:
            baton.leave_if_ended()
            raise BrokerGone('the broker is gone')
        return data


class BrokerGone(LinkLost):
    pass


# 8 BROKER ############################################################################################################
# A process of its own, forked from ansible-playbook: one loop, which owns the link to every host. Workers get a
# socket by handing one end of a pair through the door, a socket that only children of ansible-playbook have: there is
# no path that anybody else could connect to.

_broker = None          # (pid of the owner, pid of the broker, our end of the door)


# The door of this run's broker, which is started, or started again, by the process that owns it.
def door():
    global _broker
    if _broker and _broker[0] == os.getpid() and os.waitpid(_broker[1], os.WNOHANG)[0]:
        _broker[2].close()
        _broker = None
    if not _broker:
        ours, theirs = socket.socketpair()
        core()                  # made here, once, and inherited
        with display._lock:     # or a thread that prints at this moment keeps it, and stdout, locked in the broker
            pid = fork_undisturbed()
        if not pid:
            run_broker(theirs)
        theirs.close()
        _broker = os.getpid(), pid, ours
        atexit.register(ours.close)
    return _broker[2]


# Ends the broker, and with it all links.
def close_door():
    global _broker
    if _broker and _broker[0] == os.getpid():
        _broker[2].close()
        os.waitpid(_broker[1], 0)
        _broker = None


# In the child of the fork: never returns.
def run_broker(door):
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        close_fds(door.fileno())
        gc.freeze()
        lift_file_limit()
        Broker(door).run()
    finally:
        os._exit(1)


# An agent behind ssh takes five descriptors, a worker one. What we start has the limit that we were given.
def lift_file_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):      # where "unlimited" is more than the system really allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        os.register_at_fork(after_in_child=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))


# The way to one agent. Without a hello it is being opened, guided by the client that came first.
class Link:
    def __init__(self, number, head, parent, guide):
        self.number = number
        self.head = head            # the 'open' request it was made from
        self.key = head['key']
        self.parent = parent        # the Link behind which it is, or None
        self.guide = guide          # (client stream, request) that answers its prompts
        self.waiters = []           # (client stream, request, head) of those who came later
        self.hop = None             # the Hop, for a link that starts here
        self.stream = None          # the stream that leads there
        self.request = None         # ours to the parent agent, while it is being opened there
        self.hello = None           # what the agent said of itself, once it is up
        self.used = 0               # serial number of the last request for it
        self.outdated = False       # to be replaced as soon as it is not busy
        self.has = set()            # sha1 of the blobs that we know it has

    def ancestors(self):
        link = self.parent
        while link:
            yield link
            link = link.parent

    # The agent by which we came to this machine.
    def login(self):
        return self if self.head.get('most') is None else self.parent.login()


# What a client asked and an agent has not answered yet.
@dataclasses.dataclass
class Request:
    client: object          # its stream
    request: int            # the client's number for it
    link: Link              # who works on it
    opens: Link = None      # the link that it opens, if that is what it is


class Broker:
    def __init__(self, door):
        self.door = door
        self.parent_pid = os.getppid()
        self.loop = Loop()
        self.links = {}             # key -> Link
        self.numbers = {}           # number -> Link
        self.requests = {}          # our number -> Request
        self.clients = {}           # client stream -> {its request: our request}
        self.latest = {}            # client stream -> the Link behind a login that it used last
        self.blobs = {}             # sha1 -> bytes
        self.tables = {}            # hex sha1 of a table of contents -> sha1 of all it needs
        self.expected = []          # tables of contents of what the tasks of this play will run, in their order
        self.refused = set()        # lanes of which a request could not be forwarded: what follows there is not, either
        self.failed = {}            # key of a link that could not be opened -> why
        self.said = set()           # what was explained to the user
        self.serial = itertools.count(1)

    def run(self):
        self.loop.start()
        self.loop.watch(private(self.door.fileno()), readable=self.admit)
        self.watch_parent()
        self.keep_in_touch()
        try:
            while self.loop.running:
                self.loop.turn()
        except Exception:
            self.give_up(traceback.format_exc())
        self.forward_the_rest()
        for link in list(self.links.values()):
            self.close_link(link)
        deadline = now() + 4
        while self.loop.exits and now() < deadline:
            self.loop.later(0.1, lambda: None)
            self.loop.turn()
        os._exit(0)

    # What was sent just before the end: a temporary directory to be removed.
    def forward_the_rest(self):
        for stream in list(self.clients):
            stream.on_readable()
        for link in self.links.values():
            if link.hop:
                link.stream.flush()

    # A fault of ours: tell it to everybody who waits. The next task starts another broker.
    def give_up(self, text):
        for stream, requests in list(self.clients.items()):
            for request in list(requests):
                self.fail(stream, request, 'lost', 'the broker failed: ' + text)
            stream.flush()

    # kill -9 closes our door only when the last of its children is gone too: look at who our parent is as well.
    def watch_parent(self):
        if os.getppid() != self.parent_pid:
            self.loop.running = False
        self.loop.later(1, self.watch_parent)

    # Firewalls forget a connection over which nothing goes, after some minutes. An ACK that means nothing is enough,
    # and ssh keeps the settings that it has.
    def keep_in_touch(self):
        for link in self.links.values():
            if link.hello and link.login() is link:
                self.tell(link, ACK, 0)
        self.loop.later(30, self.keep_in_touch)

    def admit(self):
        try:
            data, fds, _, _ = socket.recv_fds(self.door, 1, 1)
        except BlockingIOError:
            return
        if not data:
            self.loop.running = False
        for fd in fds:
            stream = Stream(self.loop, private(fd), fd, self.from_client, self.client_gone)
            self.clients[stream] = {}
            stream.listen()

    # ---- from clients

    def from_client(self, stream, kind, node, request, payload):
        getattr(self, 'client_' + KINDS[kind])(stream, request, payload)

    def client_call(self, stream, request, payload):
        head, body = unpack(payload)
        getattr(self, 'call_' + head['call'], self.forward)(stream, request, head, body)

    def client_blobs(self, stream, request, payload):
        self.blobs.update(unpack_blobs(payload))

    def client_data(self, stream, request, payload):
        self.pass_on(stream, DATA, request, payload)

    def client_end(self, stream, request, payload):
        self.pass_on(stream, END, request, payload)

    def client_ack(self, stream, request, payload):
        self.pass_on(stream, ACK, request, payload)

    def pass_on(self, stream, kind, request, payload):
        ours = self.clients[stream].get(request)
        if ours not in self.requests:
            return
        opened = self.requests[ours].opens
        if opened and opened.hop:
            opened.hop.answer(payload[0], payload[1:])
        else:
            self.tell(self.requests[ours].link, kind, ours, payload)

    def client_gone(self, stream, why):
        self.latest.pop(stream, None)
        for ours in list(self.clients.pop(stream).values()):
            request = self.requests.pop(ours, None)
            if request and request.opens:
                self.replace_guide(request.opens, ours)
            elif request:
                self.tell(request.link, CANCEL, ours)
        for link in self.links.values():
            link.waiters = [waiter for waiter in link.waiters if waiter[0] is not stream]

    # Whoever answered the prompts is gone: the next one in the queue starts from the beginning.
    def replace_guide(self, link, ours):
        self.forget(link)
        if link.hop:
            link.hop.kill()
        else:
            self.tell(link.parent, CANCEL, ours)
        for waiter in link.waiters:
            self.call_open(*waiter, b'')

    def answer(self, stream, kind, request, payload=b''):
        if stream in self.clients:
            self.clients[stream].pop(request, None)
            stream.send(kind, 0, request, payload)

    def fail(self, stream, request, kind, text):
        self.answer(stream, FAIL, request, pack(dict(kind=kind, text=text)))

    # ---- calls

    def call_offer(self, stream, request, head, body):
        toc = bytes.fromhex(head['toc'])
        digests = sorted(set(map(bytes.fromhex, json.loads(self.blobs[toc]).values())))
        missing = [digest.hex() for digest in digests if digest not in self.blobs]
        if not missing:
            self.tables[head['toc']] = [toc] + digests
        self.answer(stream, REPLY, request, pack(dict(missing=missing)))

    # head: tables, hashes of what the main thread foresees for the rest of its play (§6); it replaces the last word.
    def call_expect(self, stream, request, head, body):
        self.expected = [toc for toc in head['tables'] if toc in self.tables]

    def call_first(self, stream, request, head, body):
        self.answer(stream, REPLY, request, pack(dict(first=head['text'] not in self.said)))
        self.said.add(head['text'])

    # head: key, of a link that is to be closed with all that is behind it.
    def call_drop(self, stream, request, head, body):
        self.failed.pop(head['key'], None)
        if head['key'] in self.links:
            self.close_link(self.links[head['key']])
        self.answer(stream, REPLY, request, pack({}))

    # head: key of a login; user, or None for all; login, whether it is meant, too. Their sessions begin otherwise now.
    def call_renew(self, stream, request, head, body):
        for link in self.links.values():
            if link.login().key == head['key'] and (head['login'] or link.login() is not link) and (
                    not head['user'] or link.hello and link.hello['user'] == head['user']):
                link.outdated = True
        self.answer(stream, REPLY, request, pack({}))

    def call_open(self, stream, request, head, body):
        link = self.current(head['key'])
        if link:
            self.use(stream, link)
        if link and link.hello:
            self.answer(stream, REPLY, request, pack(link.hello))
        elif link:
            link.waiters.append((stream, request, head))
        elif head['key'] in self.failed and end_of(self.failed[head['key']]) in head['believed']:
            self.answer(stream, FAIL, request, pack(self.failed[head['key']]))
        elif head['parent'] and not getattr(self.links.get(head['parent']), 'hello', None):
            self.fail(stream, request, 'closed', 'the way there was closed')
        else:
            self.open(stream, request, head)

    def open(self, stream, request, head):
        link = Link(next(self.serial), head, self.links.get(head['parent']), (stream, request))
        self.links[link.key] = self.numbers[link.number] = link
        self.use(stream, link)
        ours = next(self.serial)
        self.requests[ours] = Request(stream, request, link.parent or link, opens=link)
        self.clients[stream][request] = ours
        link.request = ours
        if link.parent:
            link.stream = link.parent.stream
            if head['most'] is not None:
                self.make_room(link, head['most'])
            for above in link.parent.ancestors():
                below = self.next_hop(above, link.parent)
                above.stream.send(ROUTE, above.number, below, struct.pack('>I', link.number))
            self.tell(link.parent, CALL, ours, pack(dict(head['spec'], call='hop', node=link.number)))
        else:
            link.hop = Hop(self.loop, head['spec'], core(), '/', functools.partial(self.hop_says, link),
                           functools.partial(self.hop_is_up, link), functools.partial(self.hop_failed, link),
                           functools.partial(self.link_is_down, link))
            link.stream = link.hop.stream

    # A client is likely to come back to what it used last, in the middle of a task say.
    def use(self, stream, link):
        link.used = next(self.serial)
        if link.parent:
            self.latest[stream] = link

    # For one more agent below a login: those go that were not used for longest.
    def make_room(self, link, most):
        login = link.login()
        kept = [other for other in self.links.values() if other.login() is login and other is not login]
        if len(kept) > most:
            idle = sorted(filter(self.is_idle, kept), key=lambda other: other.used)
            for other in idle[:len(kept) - most]:
                self.retire(other)

    def is_idle(self, link):
        return len(self.branch(link)) == 1 and not self.is_busy(link) and link not in self.latest.values()

    # With something to do, or on the way of somebody who has.
    def is_busy(self, link):
        busy = [link for asked in self.requests.values() for link in (asked.link, asked.opens)]
        return any(other in busy for other in self.branch(link))

    # It and all that is behind it.
    def branch(self, link):
        return [other for other in self.links.values() if link in other.ancestors()] + [link]

    # None, too, for one that is outdated and not busy.
    def current(self, key):
        link = self.links.get(key)
        if link and link.outdated and not self.is_busy(link):
            self.retire(link)
            return None
        return link

    # It takes its time to end. Whoever wants it meanwhile gets another one.
    def retire(self, link):
        if not link.parent:
            return self.close_link(link)
        self.tell(link.parent, CALL, next(self.serial), pack(dict(call='retire', name=link.number)))
        for gone in self.branch(link):
            self.forget(gone)

    # The child of `above` on the way to `link`.
    def next_hop(self, above, link):
        while link.parent is not above:
            link = link.parent
        return link.number

    # What a client wants of an agent. The sources that the agent lacks go in front of it, in the same write.
    def forward(self, stream, request, head, body):
        link = self.choose(head['to'], head['interpreter'])
        if not link or head.get('lane') in self.refused:
            self.refused.update([head['lane']] if 'lane' in head else [])
            return self.fail(stream, request, 'closed', 'not connected')
        if 'toc' in head and head['toc'] not in self.tables:
            return self.fail(stream, request, 'toc', 'sources unknown')
        if len(head['interpreter'] or ()) > 1:      # those start a Python, which knows what it is called
            head['interpreter'] = [link.hello.get('executable')]
        self.use(stream, link)
        ours = next(self.serial)
        self.requests[ours] = Request(stream, request, link)
        self.clients[stream][request] = ours
        self.supply(link, self.tables.get(head.get('toc'), []))
        self.tell(link, CALL, ours, pack(head, body))
        if 'toc' in head:
            self.supply_ahead(link)

    # What a later task will run travels while this one is at work: one module behind each request, so that the next
    # request waits for no more than that, whatever is piled up between us and the agent.
    def supply_ahead(self, link):
        for toc in self.expected:
            if not link.has.issuperset(self.tables[toc]):
                return self.supply(link, self.tables[toc])

    def choose(self, keys, interpreter):
        for link in map(self.current, keys):
            if link and link.hello and (not interpreter or link.key != keys[-1]
                                        or is_interpreter(link.hello, interpreter)):
                return link

    # Over each link once: an agent hands on to those behind it what it has itself.
    def supply(self, link, digests):
        missing = [digest for digest in digests if digest not in link.has]
        link.has.update(missing)
        if link.parent and missing:
            self.supply(link.parent, missing)
            self.tell(link.parent, SHARE, 0, struct.pack('>I', link.number) + b''.join(missing))
        elif missing:
            for blobs in batches([(digest, self.blobs[digest]) for digest in missing]):
                self.tell(link, BLOBS, 0, pack_blobs(blobs))

    def tell(self, link, kind, request, payload=b''):
        if link.stream:
            link.stream.send(kind, link.number, request, payload)

    # ---- from agents

    # Whatever an agent sends that we cannot make sense of closes the link that it came by, and nothing else.
    def from_agent(self, stream, kind, node, request, payload):
        try:
            self.take_frame(stream, kind, node, request, payload)
        except (LookupError, TypeError, ValueError, AttributeError, struct.error) as e:
            raise ProtocolError('malformed: %s' % describe(e))

    def take_frame(self, stream, kind, node, request, payload):
        link = self.numbers.get(node)
        if not link:
            return      # closed meanwhile
        if link.stream is not stream:
            raise ProtocolError('an agent spoke for another one')
        # Only of an agent behind another one: the end of the first shows in its stream.
        if kind == DOWN and link.parent:
            return self.link_is_down(link, unpack(payload)[0]['text'])
        asked = self.requests.get(request)
        if not asked:
            return      # given up meanwhile
        if asked.link is not link or kind not in (DATA, ACK, REPLY, FAIL):
            raise ProtocolError('an answer to a question that was not asked')
        if asked.opens:
            self.hop_frame(asked.opens, kind, payload)
        elif kind in (DATA, ACK):
            asked.client.send(kind, 0, asked.request, payload)
        else:
            del self.requests[request]
            self.answer(asked.client, kind, asked.request, payload)

    # What the parent agent tells of a hop that it starts for us.
    def hop_frame(self, link, kind, payload):
        if kind == DATA:
            self.hop_says(link, payload[0], payload[1:])
        elif kind == REPLY:
            self.hop_is_up(link, unpack(payload)[0], link.parent.stream)
        elif kind == FAIL:
            self.hop_failed(link, unpack(payload)[0])

    def hop_says(self, link, channel, data):
        stream, request = link.guide
        if stream in self.clients:
            stream.send(DATA, 0, request, bytes([channel]) + data)

    def hop_is_up(self, link, hello, stream):
        link.hello = checked(hello)
        self.failed.pop(link.key, None)
        if link.hop:
            stream.receive = self.from_agent
        self.requests.pop(link.request, None)
        for client, request, *_ in [link.guide] + link.waiters:
            self.answer(client, REPLY, request, pack(hello))
        link.waiters = []

    def hop_failed(self, link, head):
        self.failed[link.key] = head
        self.forget(link)
        self.requests.pop(link.request, None)
        for client, request, *_ in [link.guide] + link.waiters:
            self.answer(client, FAIL, request, pack(head))

    def link_is_down(self, link, text):
        for gone in self.branch(link):
            self.forget(gone)
            for ours, asked in list(self.requests.items()):
                if asked.link is gone:
                    del self.requests[ours]
                    self.fail(asked.client, asked.request, 'lost', text)

    def close_link(self, link):
        self.link_is_down(link, 'the connection was reset')
        if link.hop:
            link.hop.kill()

    def forget(self, link):
        self.numbers.pop(link.number, None)
        if self.links.get(link.key) is link:
            del self.links[link.key]


# Whether an agent is, or can pass for, this interpreter: the same program under another of its names.
def is_interpreter(hello, words):
    return len(words) == 1 and words[0] in hello['names']


def batches(blobs, limit=1 << 20):
    batch, size = [], 0
    for digest, blob in blobs:
        if batch and size + len(blob) > limit:
            yield batch
            batch, size = [], 0
        batch.append((digest, blob))
        size += len(blob)
    yield batch


# 9 HOPS ##############################################################################################################
# How to get from here to there: the command line that starts a program on the other side, and what to answer when it
# asks. Both come from the stock plugins. A command line is caught at the moment at which the plugin spawns it, so
# whatever options the plugin knows, we honour.

MARK = 'MITOGEN-SINGLE-%s' % os.urandom(8).hex()       # what an agent prints when it is ready for the core
PLACEHOLDER = ': ' + MARK           # stands for the bootstrap in the identity of a link; does no harm where it is run


# One hop: `key` identifies the agent to which it leads, `spec(candidates)` is what a Hop needs to start it.
@dataclasses.dataclass
class Plan:
    what: str               # for messages
    key: str
    parent: str             # key of the agent that starts it; None: the broker does
    spec: object            # (names of interpreters) -> dict
    dialogue: object        # () -> Dialogue
    words: list = None      # the interpreter, for a hop to another one
    unreachable: tuple = ('timeout',)   # ends of its program that say that there is no way to the host


def digest(*parts):
    return hashlib.sha1(json.dumps(parts, default=str).encode('utf-8', 'surrogateescape')).hexdigest()


# `identity`: what the stock plugin would spawn for the PLACEHOLDER. What is known of ssh alone: how it says that there
# is no way to the host, and that the core can be on its way before somebody waits for it. `parent`: the Plan of the
# agent that is to start it, on another machine.
def login_plan(connection, shell, patience, identity, is_ssh, parent):
    argv, _, env = identity
    squeeze = leads_away(identity)

    def spec(candidates):
        command = '%s -c %s' % (shell, shlex.quote(bootstrap(candidates, squeeze)))
        argv, cwd, env = connection.agent_argv(command)
        place = {} if parent else dict(cwd=cwd or os.getcwd(), env=env)
        return dict(place, argv=argv, mark=MARK, eager=is_ssh, patience=patience, squeeze=squeeze)

    key = digest(argv, env, password_of(connection), parent and parent.key)
    return Plan('login', key, parent and parent.key, spec,
                functools.partial(LoginDialogue, password_of(connection)),
                unreachable=(255, 'timeout') if is_ssh else ())


# Whether there is more to a command line than a shell and the command: then that is what leads to another place.
def leads_away(identity):
    return identity[0][1:] != ['-c', PLACEHOLDER]


def password_of(connection):
    for name in ('password', 'private_key_passphrase'):
        try:
            if connection.get_option(name):
                return connection.get_option(name)
        except (KeyError, AttributeError):
            continue
    return connection._play_context.password or None


def become_plan(parent, plugin, build, shell, executable, patience, cwd):
    identity = build(PLACEHOLDER, shell).replace(plugin._id or '\0', '')
    password = plugin.get_option('become_pass')
    terminal = getattr(plugin, 'require_tty', False)

    def spec(candidates):
        command = build(bootstrap(candidates, False, terminal), shell)
        if terminal:
            command = '"/proc/$PPID/exe" -c %s | %s -c %s' % (
                shlex.quote(ESCAPING), shlex.quote(executable), shlex.quote(command))
        return dict(argv=[executable, '-c', command], cwd=cwd, mark=MARK, patience=patience,
                    eager=not plugin.expect_prompt() and not terminal)

    return Plan('become', digest(parent.key, identity, password), parent.key, spec,
                functools.partial(BecomeDialogue, plugin, password))


def interpreter_plan(parent, words, patience):
    def spec(candidates):
        return dict(argv=words + ['-c', first_stage(False)], mark=MARK, eager=True, patience=patience)

    return Plan('interpreter', digest(parent.key, words), parent.key, spec, Dialogue, words)


class Caught(BaseException):    # not an Exception: the stock plugins retry on those
    pass


# What the stock plugin would spawn to run a command: argv, cwd, env. Any other program that it starts on the way, to
# look for a version or a container, it does start.
def caught(connection, exec_command, command, options):
    start = subprocess.Popen.__init__

    def catch(process, args, *more, **options):
        args = args if isinstance(args, (str, bytes)) else list(args)
        words = [os.fsdecode(word) for word in ([args] if isinstance(args, (str, bytes)) else args)]
        if not any(MARK in word for word in words):
            return start(process, args, *more, **options)
        if options.get('shell'):
            words = [os.fsdecode(options.get('executable') or '/bin/sh'), '-c'] + words
        raise Caught(words, options.get('cwd'), options.get('env'))

    subprocess.Popen.__init__ = catch
    try:
        with quiet(connection._display), with_options(connection, options):
            exec_command(command, in_data=b'-', sudoable=False)
    except Caught as e:
        argv, cwd, env = e.args
        return without_sshpass(argv), os.fsdecode(cwd) if cwd else None, env
    finally:
        subprocess.Popen.__init__ = start
    raise NoAgent('this connection plugin starts no program that is given the command')


# What it displays is about a command that nobody asked for.
@contextlib.contextmanager
def quiet(display):
    verbosity, display.verbosity = display.verbosity, 0
    try:
        yield
    finally:
        display.verbosity = verbosity


# With these options for the moment; and as if sshpass was there, which the plugin wants to see before it goes on.
@contextlib.contextmanager
def with_options(connection, options):
    before = {name: connection._options[name] for name in options if name in connection._options}
    connection._sshpass_available = lambda: True
    connection._options.update({name: options[name] for name in before})
    try:
        yield
    finally:
        connection._options.update(before)
        del connection._sshpass_available
        for fd in getattr(connection, 'sshpass_pipe', None) or ():
            os.close(fd)
        connection.sshpass_pipe = None


def without_sshpass(argv):
    if argv[0] != 'sshpass':
        return argv
    return argv[4:] if argv[2] == '-P' else argv[2:]


# Hears what a program says before it is an agent, by channel; says what to answer, and where.
class Dialogue:
    def hear(self, channel, data):
        return channel, None

    def failed(self, head):
        raise HopFailed(head)


# ssh asks on its terminal. A password is tried once: a second question means that it was wrong, and a third attempt
# may lock the account. Without one, an empty line makes ssh try its next way; host keys are never accepted blindly.
class LoginDialogue(Dialogue):
    def __init__(self, password):
        self.password = password
        self.heard = b''
        self.asked = 0

    def hear(self, channel, data):
        if channel != TTY:
            return channel, None
        self.heard += data
        if re.search(rb'\(yes/no[^)]*\)\?\s*$', self.heard):
            self.heard = b''
            return TTY, b'no\n'
        if not re.search(rb'(assword|assphrase|PIN|code)[^\n]*:\s*$', self.heard, re.I):
            return TTY, None
        self.asked += 1
        self.heard = b''
        if self.password and self.asked > 1:
            raise LoginRefused('Invalid/incorrect password: the login was refused')
        return TTY, (self.password or '').encode('utf-8', 'surrogateescape') + b'\n'


# Whether it asks, and what it says of a password, the become plugin knows.
class BecomeDialogue(Dialogue):
    def __init__(self, plugin, password):
        self.plugin = plugin
        self.password = password
        self.heard = {}             # channel -> what came since the last answer
        self.answered = False
        self.succeeded = False

    def hear(self, channel, data):
        heard = self.heard[channel] = self.heard.get(channel, b'') + data

        # Some stock connection plugins show a become plugin all that came, others a line at a time.
        def says(check):
            return any(check(part) for part in [heard] + heard.splitlines(True))

        self.succeeded = self.succeeded or says(self.plugin.check_success)
        if self.succeeded:
            return channel, None
        if self.answered and says(self.plugin.check_incorrect_password):
            raise BecomeRefused('Incorrect %s password' % self.plugin.name)
        if says(self.plugin.check_missing_password):
            raise BecomeRefused('Missing %s password' % self.plugin.name)
        if not self.plugin.expect_prompt() or not says(self.plugin.check_password_prompt):
            return channel, None
        if self.answered:
            raise BecomeRefused('Incorrect %s password' % self.plugin.name)
        self.answered, self.heard = True, {}
        return (TTY if channel == TTY else STDIN), self.password.encode('utf-8', 'surrogateescape') + b'\n'

    def failed(self, head):
        if head['kind'] == 'timeout':
            head['text'] = 'Timeout waiting for privilege escalation prompt: ' + head['text']
        elif head['kind'] == 'exit' and not self.succeeded and head['code'] not in (NO_PYTHON, NO_PIPE):
            raise BecomeEnded(head)
        super().failed(head)


# 10 SHIPPING #########################################################################################################
# The part of this file below the fence, as it travels: without comments, with one blank for four and none around
# operators, and with its line numbers, so that a traceback from a target names the true line of this file.

FENCE = '# ======== everything below this line is sent to targets'
LAST_FENCE = '# ======== everything below this line is sent by itself'


@functools.lru_cache(maxsize=None)
def core():
    source = inspect.getsource(sys.modules[__name__]).partition('\n' + LAST_FENCE)[0]
    above, fence, below = source.partition('\n' + FENCE)
    text = re.sub(r'(?m)(^ *|  )#.*$', '', fence + below)
    text = re.sub(r'(?m)^ +', lambda found: ' ' * (len(found.group()) // 4), text)
    text = re.sub(r"('[^'\n]*')|(?<=\S) ?([=,:%+*/<>!|&-]+) (?=\S)", lambda found: found[1] or found[2], text)
    return zlib.compress(('\n' * above.count('\n') + text).encode('ascii'), 9)


# The module of §20: its text up to the command line's, and a line that runs it.
@functools.lru_cache(maxsize=None)
def job_source():
    source = inspect.getsource(sys.modules[__name__]).partition('\n' + LAST_FENCE)[2]
    return (LAST_FENCE + source.rpartition('\nif __name__')[0] + '\nrun_job(_modlib_path)\n').encode('ascii')


# Exit codes of what runs before the core does.
NO_PYTHON = 97
NO_PIPE = 98

# Behind machinectl, and run0 up to systemd 256, stdin is a terminal whatever we do. The new agent can ask for its bytes
# as they are; but three times 0x1D in a row asks machinectl to leave. So that byte travels as two others: what runs in
# front of such a program, and what runs behind it, beside the agent, as a part of the first stage below.
ESCAPING = ('import os,select\nq=select.poll()\nq.register(0,1)\nq.register(1,0)\nwhile not 1 in dict(q.poll()):\n'
            ' d=os.read(0,65536)\n if not d:break\n'
            ' d=d.replace(b"\\x1e",b"\\x1e0").replace(b"\\x1d",b"\\x1e1")\n while d:d=d[os.write(1,d):]')
UNESCAPING = ('import os,select,tty\\nif os.isatty(0):tty.setraw(0)\\nif os.isatty(2):os.dup2(os.open("/dev/null",1),2)'
              '\\nr,p=os.pipe()\\nif not os.fork():\\n os.close(r)\\n q=select.poll()\\n q.register(0,1)\\n'
              ' q.register(p,0)\\n e=b""\\n while 1:\\n  if p in dict(q.poll()):os._exit(0)\\n'
              '  try:d=os.read(0,65536)\\n  except OSError:d=b""\\n  if not d:os._exit(0)\\n  e+=d\\n'
              '  n=len(e)-e.endswith(b"\\x1e")\\n'
              '  d=e[:n].replace(b"\\x1e1",b"\\x1d").replace(b"\\x1e0",b"\\x1e")\\n  e=e[n:]\\n'
              '  while d:d=d[os.write(p,d):]\\nos.dup2(r,0)\\nos.close(r)\\nos.close(p)\\n')


# What Python runs first: say that it is there, read the core, run it. Not from a terminal, which garbles what is not
# text. One line without a quote or an exclamation mark that a login shell could take for its own.
def first_stage(squeeze, terminal=False):
    code = ('import os,zlib\\nw=os.write\\nd=b""\\ndef no(why):w(2,b"stdin is "+why);os._exit({no_pipe})\\n'
            'if os.isatty(0):no(b"a terminal")\\nw(1,b"{mark}")\\nwhile len(d)<{size}:\\n'
            ' c=os.read(0,{size}-len(d))\\n if not c:no(b"empty")\\n d+=c\\ng=dict(__name__="mitogen_single")\\n'
            'exec(compile(zlib.decompress(d),"mitogen_single.py","exec"),g)\\ng["main"](d,{squeeze})')
    code = code.format(mark=MARK, size=len(core()), squeeze=bool(squeeze), no_pipe=NO_PIPE)
    return "exec('%s%s')" % (UNESCAPING if terminal else '', code)


# What /bin/sh runs before that: the first of these interpreters that is there and starts, which pyenv's stand-in for
# one that is not installed does not. To ask costs 1 ms.
def bootstrap(candidates, squeeze, terminal=False):
    names = ' '.join(shlex.quote(name) for name in candidates)
    return ('for p in %s; do p=`command -v "$p"` && "$p" -V </dev/null >/dev/null 2>&1 && exec "$p" -c %s; done; '
            'echo no Python found >&2; exit %d' % (names, shlex.quote(first_stage(squeeze, terminal)), NO_PYTHON))


# 11 COMMAND LINE #####################################################################################################
# What this file does when it is run instead of loaded. `demo` must work where there is no Ansible: only what runs in
# Ansible's own Python imports it.
USAGE = """usage: python3 mitogen_single.py COMMAND

    demo [OPTIONS] [HOST]      run a small playbook by stock Ansible and by this plugin, and compare time and results
    doctor [OPTIONS] [HOST]    does this file fit the Ansible here? with a HOST: does every step of the way to it work?
    --version

demo takes localhost unless a HOST or an inventory is given. OPTIONS are Ansible's own: -i -u -e -b -k -K
--private-key --become-user --become-method."""
KNOWN_ANSIBLE = ('2.16', '2.17', '2.18', '2.19', '2.20', '2.21')
PLUGIN_FOLDER = os.path.dirname(os.path.abspath(__file__))
PLUGIN_FILE = os.path.basename(__file__)
PLUGIN_NAME = os.path.splitext(PLUGIN_FILE)[0]


def command_line(argv):
    commands = {'demo': demo, 'doctor': doctor}
    if argv == ['--version']:
        print('mitogen_single', __version__)
        return 0
    if not argv or argv[0] not in commands:
        print(USAGE)
        return 0 if argv in ([], ['-h'], ['--help']) else 2
    try:
        return commands[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return 130


# -> options for an Ansible command, HOST or None
def parse(command, argv):
    parser = argparse.ArgumentParser(prog='%s %s' % (PLUGIN_FILE, command), description='Options go to Ansible.')
    for names in ('-i --inventory', '-u --user', '-e --extra-vars', '--private-key', '--become-user',
                  '--become-method'):
        parser.add_argument(*names.split(), action='append', default=[])
    for names in ('-b --become', '-k --ask-pass', '-K --ask-become-pass'):
        parser.add_argument(*names.split(), action='store_true')
    parser.add_argument('HOST', nargs='?')
    found = vars(parser.parse_args(argv))
    host, options = found.pop('HOST'), []
    for name, value in found.items():
        flag = '--' + name.replace('_', '-')
        options += [flag] if value is True else [word for item in value or () for word in (flag, item)]
    return options, host


# A host that no inventory of the user's knows becomes one of its own.
def with_inventory(options, host, python):
    if '--inventory' in options or host == 'localhost':
        return options
    known = subprocess.run([python, '-m', 'ansible', 'adhoc', host, '--list-hosts'], capture_output=True, text=True)
    return options if host in known.stdout.split() else options + ['--inventory', host + ',']


# ---- which Ansible: what starts ansible-playbook, its version, its Python

# The one beside this Python, the one on the PATH, one without its scripts, the one that we made ourselves.
def installed():
    beside = os.path.join(os.path.dirname(sys.executable), 'ansible-playbook')
    candidates = [beside], ['ansible-playbook'], [sys.executable, '-m', 'ansible', 'playbook'], private_playbook()
    return next(filter(None, map(probe, candidates)), None)


def probe(playbook):
    try:
        said = subprocess.run(playbook + ['--version'], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r'\[core ([^]\s]+).*^ *python version = [^\n]*\((/[^\n]*)\)$', said, re.S | re.M)
    return found and (playbook, *found.groups())


def private_playbook():
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return [os.path.join(cache, 'mitogen_single', 'venv', 'bin', 'ansible-playbook')]


def install():
    if sys.version_info < (3, 10):
        sys.exit('There is no Ansible here, and this Python is too old for one that we know: take 3.10 or newer.')
    folder = os.path.dirname(private_playbook()[0])
    place, env = os.path.dirname(folder), dict(os.environ)
    print('There is no Ansible here: installing ansible-core in a venv of our own, %s' % place, flush=True)
    make = [sys.executable, '-m', 'venv', '--clear', place]
    if subprocess.run(make, capture_output=True).returncode:
        quietly(make + ['--without-pip'], env)      # Debian's python3 comes without ensurepip
        env['PYTHONPATH'] = fetch_pip(place)
    quietly([os.path.join(folder, 'python3'), '-m', 'pip', 'install', 'ansible-core'], env)
    return probe(private_playbook()) or sys.exit('ansible-core was installed there, but does not start')


def quietly(argv, env):
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit('%s\nfailed: %s' % (done.stdout.rstrip(), shlex.join(argv)))


# A wheel of pip is a program and its own import path.
def fetch_pip(place, index='https://pypi.org/pypi/pip/json'):
    from urllib.parse import urljoin
    from urllib.request import urlopen
    with urlopen(index, timeout=60) as answer:
        wheel = next(file for file in json.load(answer)['urls'] if file['packagetype'] == 'bdist_wheel')
    with urlopen(urljoin(index, wheel['url']), timeout=60) as answer:
        data = answer.read()
    if hashlib.sha256(data).hexdigest() != wheel['digests']['sha256']:
        sys.exit('%s is not what pypi.org says it is' % wheel['url'])
    path = os.path.join(place, os.path.basename(wheel['filename']))
    with open(path, 'wb') as file:
        file.write(data)
    return path


# ---- demo

DEMO = r"""
- hosts: HOSTS
  tasks:
    - tempfile: {state: directory, prefix: mitogen_single_demo_}
      register: place
    - block:
        - command: uname -s
        - shell: echo one two three | wc -w
          register: words
        - assert: {that: words.stdout | int == 3}
        - command: echo {{ item }}
          loop: [red, orange, yellow, green, blue, indigo, violet]
        - file: {path: "{{ place.path }}/etc", state: directory, mode: "0750"}
        - copy: {dest: "{{ place.path }}/etc/conf", content: "port = 80\nlog = on\n", mode: "0644"}
        - copy: {dest: "{{ place.path }}/etc/conf", content: "port = 80\nlog = on\n", mode: "0644"}
        - copy:
            dest: "{{ place.path }}/etc/motd"
            content: "{% for n in range(20) %}{{ n }} {{ ansible_facts.hostname }} {{ n * n }}\n{% endfor %}"
        - lineinfile: {path: "{{ place.path }}/etc/conf", regexp: "^{{ item }} =", line: "{{ item }} = new"}
          loop: [port, log, user]
        - blockinfile: {path: "{{ place.path }}/etc/conf", block: "a = 1\nb = 2"}
        - replace: {path: "{{ place.path }}/etc/conf", regexp: new, replace: newer}
        - file: {path: "{{ place.path }}/etc/link", src: conf, state: link}
        - stat: {path: "{{ place.path }}/etc/link", follow: true}
          register: conf
        - debug: {var: conf.stat.checksum}
        - slurp: {src: "{{ place.path }}/etc/conf"}
          register: text
        - assert: {that: "'port = newer' in text.content | b64decode"}
        - find: {paths: "{{ place.path }}", recurse: true}
        - command: "false"
          when: words.stdout | int != 3
        - command: "false"
          ignore_errors: true
        - command: ls {{ place.path }}/etc
      always:
        - file: {path: "{{ place.path }}", state: absent}
"""
ENGINES = {'stock': 'linear', PLUGIN_NAME: PLUGIN_NAME}


def demo(argv):
    import ctypes
    options, host = parse('demo', argv)
    host = host or ('all' if '--inventory' in options else 'localhost')
    playbook, version, python = installed() or install()
    options = with_inventory(options, host, python)
    print('Ansible %s, %s: a playbook against %s, twice by each, in turn' % (version, shlex.join(playbook), host))
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)     # PR_SET_CHILD_SUBREAPER: we wait for what a run leaves behind
    runs = {name: [] for name in ENGINES}
    for name in list(ENGINES) * 2:
        run = run_demo(playbook + options, ENGINES[name], host)
        runs[name].append(run)
        print('  %-16s%8.2f s' % (name, run['time']), flush=True)
        if run['code']:
            print('ended with exit code %d:' % run['code'], *run['text'].splitlines()[-25:], sep='\n    ')
            where = ['python3', __file__, 'doctor'] + argv + ([] if host in argv else [host])
            print('Where does it stop? %s' % shlex.join(where))
            return 1
    show_table(runs)
    return compare(*[found[-1]['text'] for found in runs.values()])


def run_demo(argv, strategy, host):
    place = tempfile.mkdtemp(prefix='mitogen_single_', dir='/tmp')      # short: a ControlPath must fit into 104 bytes
    env = dict(os.environ, ANSIBLE_STRATEGY_PLUGINS=PLUGIN_FOLDER, ANSIBLE_STRATEGY=strategy, ANSIBLE_NOCOLOR='1',
               ANSIBLE_FORCE_COLOR='0', ANSIBLE_STDOUT_CALLBACK='default', ANSIBLE_SSH_CONTROL_PATH_DIR=place + '/cp',
               MITOGEN_SINGLE_ENABLED=str(strategy == PLUGIN_NAME),
               PATH=place + ':' + os.environ.get('PATH', os.defpath))
    try:
        # ssh itself says at its end how many bytes it sent and received, when it is asked to.
        with open(place + '/ssh', 'w', opener=functools.partial(os.open, mode=0o700)) as file:
            ssh = shutil.which('ssh') or 'false'
            file.write('#!/bin/sh\nexec %s -o LogLevel=VERBOSE -E %s/log "$@"\n' % (shlex.quote(ssh), place))
        with open(place + '/demo.yml', 'w') as file:
            file.write(DEMO.replace('HOSTS', json.dumps(host)))
        return measure(argv + [place + '/demo.yml'], env, place)
    finally:
        settle(place)       # Ctrl-C came: it came to Ansible too
        shutil.rmtree(place, ignore_errors=True)


# cpu: of all processes on this machine. forks: on this machine, threads too. bytes: over ssh, both ways. 0: not known
def measure(argv, env, place):
    before, forks, began = cpu_so_far(), forks_so_far(), now()
    process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    text = process.communicate()[0].decode('utf-8', 'replace')
    wall, forks = now() - began, forks_so_far() - forks
    settle(place)
    log = ''
    with contextlib.suppress(FileNotFoundError), open(place + '/log', errors='replace') as file:
        log = file.read()
    counts = re.findall(r'Transferred: sent (\d+), received (\d+) bytes', log)
    return dict(code=process.returncode, text=text + (log if process.returncode else ''), time=wall, forks=forks,
                cpu=cpu_so_far() - before, bytes=sum(int(n) for pair in counts for n in pair))


def cpu_so_far():
    import resource
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def forks_so_far():
    with contextlib.suppress(OSError), open('/proc/stat') as file:
        return int(re.search(r'^processes (\d+)', file.read(), re.M).group(1))
    return 0


# What a run leaves behind: an ssh that Ansible keeps for a minute, for the next run; our broker. See them end.
def settle(place):
    deadline = now() + 6
    end_masters(place + '/cp')
    with contextlib.suppress(ChildProcessError):
        while now() < deadline:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.05)
                end_masters(place + '/cp')


def end_masters(folder):
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        subprocess.run(['ssh', '-O', 'exit', '-S', entry.path, 'x'], capture_output=True)


def show_table(runs):
    best = [{name: min(run[name] for run in found) for name in found[0]} for found in runs.values()]
    columns = [column for column in (('time', '%.2f s', 1), ('cpu', '%.2f s', 1), ('forks', '%d', 1),
                                     ('bytes', '%.1f kB', 1000)) if all(row[column[0]] for row in best)]
    print('\n%-16s' % 'best of two' + ''.join('%12s' % name for name, _, _ in columns))
    for engine, row in zip(runs, best):
        print('%-16s' % engine + ''.join('%12s' % (form % (row[name] / unit)) for name, form, unit in columns))
    print('%-16s' % 'ratio' + ''.join('%12.1f' % (best[0][name] / best[1][name]) for name, _, _ in columns))
    print('cpu and forks are those of this machine\n')


# Every task with what became of it, and the recap.
def outcome(text):
    return re.findall(r'(?m)^(?:TASK \[.*\]|[a-z]+: \[.*?(?= => \{|$)|\S+ +: ok=.*)', text)


def compare(stock, ours):
    import difflib
    stock, ours = outcome(stock), outcome(ours)
    if stock == ours:
        print('The results are the same:', *[line for line in ours if ' : ok=' in line], sep='\n  ')
    else:
        lines = difflib.unified_diff(stock, ours, 'stock', PLUGIN_NAME, lineterm='', n=1)
        print('THE RESULTS DIFFER:', *lines, sep='\n  ')
    return int(stock != ours)


# ---- doctor


def doctor(argv):
    options, host = parse('doctor', argv)
    if ConnectionBase is object:
        return change_python(['doctor'] + argv)
    os.environ.setdefault('ANSIBLE_DEPRECATION_WARNINGS', '0')      # one of them is about every strategy plugin
    os.environ['ANSIBLE_SSH_CONTROL_PATH'] = 'none'     # an ssh that somebody left open would hide what a login does
    plugin = loaded_by_ansible()
    well = look_around(plugin)
    if host:
        well = examine(plugin, with_inventory(options, host, sys.executable) + [host]) and well
    print('All is well.' if well else 'NOT all is well.')
    return 0 if well else 1


# Continue in the Python that Ansible runs in.
def change_python(argv):
    _, version, python = installed() or (None, None, None)
    if not python:
        print('There is no Ansible here. The demo would install one for itself.')
    elif python == sys.executable:
        print('Ansible %s is not one that this plugin knows: it cannot import what it needs.' % version)
    else:
        os.execv(python, [python, __file__] + argv)
    return 1


# This file once more, as the plugin that it is for Ansible.
def loaded_by_ansible():
    from ansible.plugins.loader import strategy_loader
    strategy_loader.add_directory(PLUGIN_FOLDER)
    return sys.modules[strategy_loader.get(PLUGIN_NAME, class_only=True).__module__]


def look_around(plugin):
    from ansible import release
    known = release.__version__.startswith(tuple(version + '.' for version in KNOWN_ANSIBLE))
    rows = plugin.patches()
    missing = ['%s.%s' % (owner.__name__, name) for owner, name, _ in rows if not hasattr(owner, name)]
    for row in (('mitogen_single', '%s, %s' % (__version__, plugin.__file__)),
                ('Ansible', '%s, %s' % (release.__version__, os.path.dirname(release.__file__))),
                ('', '' if known else 'NOT one of the versions that this plugin knows: ' + ' '.join(KNOWN_ANSIBLE)),
                ('Python', '%s, %s' % (sys.version.split()[0], sys.executable)),
                ('seams', 'MISSING: ' + ', '.join(missing) if missing else 'all %d fit' % len(rows)),
                ('core', '%.1f KiB as shipped' % (len(plugin.core()) / 1024)),
                ('boot_timeout', '%s s' % plugin.setting('boot_timeout'))):
        if row[1]:
            print('%-16s%s' % row, flush=True)
    return known and not missing


# Tells of each step as it ends, from whatever process it runs in: workers have another stdout, and memory of their own.
class Report:
    def __init__(self, plugin):
        import mmap
        self.plugin = plugin
        self.out = os.dup(1)
        self.shared = mmap.mmap(-1, 64)     # how many modules did an agent run?; name of the first step that failed

    def say(self, what, seconds, text):
        text = text.strip().replace('\n', '\n' + ' ' * 26)
        os.write(self.out, ('%-16s%6.2f s  %s\n' % (what, seconds, text)).encode('utf-8', 'replace'))

    def stopped_at(self, what):
        if not self.shared[1]:
            self.shared[1:1 + len(what)] = what.encode()

    # -> what the function returns, and seconds. Two errors are none: the plugin mends them by its next step.
    def step(self, what, function, *args, **kwargs):
        began = now()
        try:
            return function(*args, **kwargs), now() - began
        except (self.plugin.NotConnected, self.plugin.UnknownModule):
            raise
        except Exception as e:
            self.stopped_at(what)
            self.say(what, now() - began, 'FAILED: ' + cause(e))
            raise

    def login_plan(self, login_plan):
        return lambda *args: self.step('resolve', login_plan, *args)[0]

    def open(self, client_open):
        def patched_open(client, plan, candidates, *more):
            spec, seconds = self.step('resolve', plan.spec, candidates)
            self.say('resolve', seconds, plain_command(spec['argv']))
            hello, seconds = self.step(plan.what, client_open, client, plan, candidates, *more)
            python = '.'.join(map(str, hello['python']))
            self.say(plan.what, seconds, 'account %s, Python %s, %s' % (hello['user'], python, hello['executable']))
            return hello
        return patched_open

    def call(self, client_call):
        def patched_call(client, head, *args, **kwargs):
            what = 'module' if head['call'] == 'run' else head['call']
            reply, seconds = self.step(what, client_call, client, head, *args, **kwargs)
            if what == 'module':
                self.shared[0] += 1
                self.say(what, seconds, '%s, run %d: exit code %d' % (head['fqn'], self.shared[0], reply['rc']))
                if reply['rc']:
                    self.stopped_at(what)
            return reply
        return patched_call

    # Ansible's own words, for what failed.
    def send_callback(self, send_callback):
        def patched_send(manager, name, *args, **kwargs):
            if name in ('v2_runner_on_failed', 'v2_runner_on_unreachable'):
                self.stopped_at('task')
                print('Ansible says:', flush=True)
                send_callback(manager, name, *args, **kwargs)
        return patched_send

    def verdict(self, code):
        step = self.shared[1:].rstrip(b'\0').decode()
        if isinstance(code, str):
            print(code)
        elif step:
            print('%-16sis the first step that failed' % step)
        elif not code and not self.shared[0]:
            print('%-16swas needed: stock Ansible runs this host, its connection is of another kind' % 'no agent')
        return not code and not step


# What went wrong, then all that the other side said.
def cause(error):
    head = getattr(error, 'head', None)
    if not head:
        return '%s: %s' % (type(error).__name__, error)
    said = [str(head.get(name) or '').strip() for name in ('text', 'tty', 'stdout', 'stderr')]
    return '\n'.join(filter(None, said))


# What starts an agent stands in it in full, quoted once or twice: nobody wants to read that.
def plain_command(argv):
    if argv[-1].startswith('exec('):
        argv = argv[:-1] + ['AGENT']
    return shlex.join(re.sub(r"(?s)'for p in .*exit 97'|for p in .*exit 97", 'AGENT', word) for word in argv)


# Two pings as an ad hoc command of Ansible's own, so that every option and variable means what it always does.
def examine(plugin, argv):
    from ansible.cli.adhoc import AdHocCLI
    from ansible.executor.task_queue_manager import TaskQueueManager

    class Examination(AdHocCLI):
        @staticmethod
        def get_host_list(inventory, subset, pattern):
            hosts = inventory.list_hosts(pattern)
            if len(hosts) != 1:
                sys.exit('%s is %d hosts of this inventory: name one' % (pattern, len(hosts)))
            return hosts

        def _play_ds(self, pattern, *more):
            return dict(hosts=pattern, gather_facts=False, strategy=PLUGIN_NAME, tasks=[dict(action='ping')] * 2)

    report = Report(plugin)
    plugin.login_plan = report.login_plan(plugin.login_plan)
    plugin.Client.open, plugin.Client.call = report.open(plugin.Client.open), report.call(plugin.Client.call)
    TaskQueueManager.send_callback = report.send_callback(TaskQueueManager.send_callback)
    try:
        Examination.cli_executor(['ansible', '-m', 'ping'] + argv)
    except SystemExit as e:
        return report.verdict(e.code)


# ======== everything below this line is sent to targets: Python 2.7 and 3.6+, stdlib only, no import side effects =====
# Rules for what follows: ASCII, no docstrings, no f-strings, no string over several lines, comments on lines of their
# own or behind two blanks (they do not travel, the line numbers stay), nothing that runs at import. The broker imports
# it, targets receive it; both speak to each other only in the messages below.

# 12 WIRE #############################################################################################################
# A frame is a header and a payload. `node` is the agent that a frame goes to (down) or comes from (up), `request`
# ties an answer to its question. Payloads that are worth it go through the stream's own zlib context, so the
# hundredth task costs about 100 bytes where the first cost 1 kB.
import collections
import errno
import fcntl
import gc
import hashlib
import heapq
import json
import os
import select
import signal
import stat
import struct
import sys
import time
import zlib

PY2 = sys.version_info[0] == 2
now = time.time if PY2 else time.monotonic
HEADER = struct.Struct('>BBIII')    # kind, flags, node, request, bytes of payload
MAX_FRAME = 16 << 20                # a longer one is a protocol error: whoever sends it is broken or hostile
MAX_HEAD = 1 << 20                  # bytes of JSON that we parse: the objects it makes take twenty times as many
CHUNK = 128 << 10                   # bytes of file or output per DATA: small ones cost CPU, large ones delay others
PIPE = 64 << 10                     # bytes that a pipe holds at first
F_SETPIPE_SZ = 1031                 # Linux; Python knows its name since 3.10
SQUEEZED = 1                        # flag: the payload went through the sender's zlib context

# The message table. A kind has one handler in Agent, on_<name>, and is told apart by from_client and from_agent in
# Broker. Payloads by sender and meaning; pack() makes a json head and a body of bytes one payload.
HELLO = 0       # agent    json               who and what it is: the first frame of a new agent
CALL = 1        # broker   pack(head, body)   a request; head['call'] names the handler, call_<name>
DATA = 2        # both     channel, bytes     more of a request's input or output
END = 3         # broker   nothing            no more DATA from this side
ACK = 4         # both     nothing            one more DATA of a file was taken: the window moves on
REPLY = 5       # agent    pack(head, body)   the request is done
FAIL = 6        # agent    pack(head)         the request failed: kind, text, ..; the last frame of a request, as REPLY
CANCEL = 7      # broker   nothing            nobody waits any more: end it, do not answer
BLOBS = 8       # broker   sha1, u32, bytes.. module sources, to be kept by their hash
SHARE = 9       # broker   u32 node, sha1..   hand these blobs on to that child agent
ROUTE = 10      # broker   u32 node           that agent is to be found below the child named by `request`
DOWN = 11       # agent    pack(head)         the agent named by `node` is gone
KINDS = ('hello', 'call', 'data', 'end', 'ack', 'reply', 'fail', 'cancel', 'blobs', 'share', 'route', 'down')
STDIN = 0       # the channels of DATA
STDOUT = 1
STDERR = 2
TTY = 3
FILE = 4        # a piece of a file
PACKED = 5      # the same, compressed for itself: whoever hands it on need not look into it


class ProtocolError(Exception):
    pass


def pack(head, body=b''):
    text = json.dumps(head).encode('ascii')
    return struct.pack('>I', len(text)) + text + body


# Raises ProtocolError for anything that pack() cannot have made.
def unpack(payload):
    try:
        size, = struct.unpack_from('>I', payload)
        head = json.loads(bytes(payload[4:4 + min(size, MAX_HEAD)]).decode('ascii'))
    except (struct.error, ValueError):
        raise ProtocolError('malformed header')
    if not isinstance(head, dict):
        raise ProtocolError('malformed header')
    return head, bytes(payload[4 + size:])


def pack_blobs(blobs):
    return b''.join(digest + struct.pack('>I', len(blob)) + blob for digest, blob in blobs)


def unpack_blobs(payload):
    at = 0
    while at < len(payload):
        size, = struct.unpack_from('>I', payload, at + 20)
        blob = bytes(payload[at + 24:at + 24 + size])
        if hashlib.sha1(blob).digest() != bytes(payload[at:at + 20]):
            raise ProtocolError('a blob does not match its hash')
        yield bytes(payload[at:at + 20]), blob
        at += 24 + size


# File names and environments travel as JSON text in which lone surrogates stand for bytes that are not UTF-8.
def to_fs(text):
    if not PY2:
        return os.fsencode(text)
    if not isinstance(text, type(u'')):
        return text
    import re
    return re.sub(b'\xed([\xb2\xb3])([\x80-\xbf])',
                  lambda m: chr(((ord(m.group(1)) & 3) << 6) + (ord(m.group(2)) & 63)), text.encode('utf-8'))


def from_fs(data):
    return data.decode('utf-8', 'replace') if PY2 else os.fsdecode(data)


def says_again(error):
    return error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)


# Every descriptor of ours is non-blocking where the loop owns it, and never inherited by a program that we start.
def private(fd, blocking=False):
    fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.fcntl(fd, fcntl.F_GETFD) | fcntl.FD_CLOEXEC)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK if blocking else flags | os.O_NONBLOCK)
    return fd


# 13 LOOP #############################################################################################################
# One poll() for everything a process of ours waits for: streams, pipes of children, their ends, timers. A turn is
# write what was queued, poll, call what is ready: so what a turn produces leaves in as few writes as possible.


class Loop(object):
    def __init__(self):
        self.poller = select.poll()
        self.watched = {}           # fd -> [on_readable or None, on_writable or None]
        self.timers = []            # heap of (when, serial, callback)
        self.serial = 0
        self.dirty = []             # streams with something queued since the last flush
        self.exits = {}             # pid -> callback(exit code)
        self.idle = collections.deque()     # work for when there is nothing else, a few ms apiece
        self.running = True
        self.wake, self.waker = [private(fd) for fd in os.pipe()]

    def start(self):
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        signal.set_wakeup_fd(self.waker)
        self.watch(self.wake, readable=self.reap)

    def watch(self, fd, **callbacks):
        entry = self.watched.setdefault(fd, [None, None])
        entry[0] = callbacks.get('readable', entry[0])
        entry[1] = callbacks.get('writable', entry[1])
        mask = (select.POLLIN if entry[0] else 0) | (select.POLLOUT if entry[1] else 0)
        if mask:
            self.poller.register(fd, mask)
        else:
            self.forget(fd)

    def forget(self, fd):
        if self.watched.pop(fd, None):
            self.poller.unregister(fd)

    def close(self, fd):
        self.forget(fd)
        os.close(fd)

    def later(self, seconds, callback):
        self.serial += 1
        entry = [now() + seconds, self.serial, callback]
        heapq.heappush(self.timers, entry)
        return entry

    # Children are asked for one by one: a waitpid(-1) would steal the exit of a child that somebody else started.
    def reap(self):
        try:
            os.read(self.wake, 4096)
        except OSError as e:
            if not says_again(e):
                raise
        for pid in list(self.exits):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.exits.pop(pid)(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))

    def turn(self):
        before = self.running
        dirty, self.dirty = self.dirty, []
        for stream in dirty:
            stream.flush()
        if self.running != before:
            return      # what was to be written found the other end gone: there is nothing to wait for
        timeout = 0 if self.idle else None
        if self.timers and not self.idle:
            timeout = max(0, int((self.timers[0][0] - now()) * 1000) + 1)
        try:
            events = self.poller.poll(timeout)
        except (OSError, select.error) as e:
            if e.args[0] != errno.EINTR:
                raise
            events = []
        for fd, event in events:
            self.dispatch(fd, event)
        while self.timers and self.timers[0][0] <= now():
            callback = heapq.heappop(self.timers)[2]
            if callback:
                callback()
        if not events and self.idle:
            self.idle.popleft()()

    def dispatch(self, fd, event):
        readable, writable = self.watched.get(fd, (None, None))
        if writable and event & ~select.POLLIN:
            writable()
        if readable and event & ~select.POLLOUT and fd in self.watched:
            readable()
        elif event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) and not writable:
            self.forget(fd)


def cancel(timer):
    timer[2] = None


# One end of a link: frames in, frames out, nothing that blocks. `receive(stream, kind, node, request, payload)` and
# `closed(stream, why)` belong to the owner. Only a stream that leaves the machine squeezes: zlib at 60 MB/s is a
# gain over a network and a loss over a pipe.
#
# Requests do not wait for each other's data: DATA, and what follows it in the same request, queues by request, and the
# queues take turns; everything else goes in front. So a small task beside a big file waits for a piece of it.
class Stream(object):
    def __init__(self, loop, rfd, wfd, receive, closed, squeeze=False):
        self.loop = loop
        self.rfd = rfd
        self.wfd = wfd
        self.receive = receive
        self.closed = closed
        self.inbox = []                     # what was read and is not a whole frame yet
        self.missing = 0                    # bytes without which there is no use in looking at the inbox
        self.prompt = collections.deque()   # frames to send: (kind, node, request, payload)
        self.queues = collections.OrderedDict()     # (node, request) -> frames to send after those, in turn
        self.rest = b''                     # what is left of the last write
        self.widened = []                   # pipes that we made, or tried to make, wider
        self.deflater = zlib.compressobj() if squeeze else None
        self.inflater = zlib.decompressobj()
        self.open = True

    def listen(self):
        self.loop.watch(self.rfd, readable=self.on_readable)

    def send(self, kind, node, request, payload=b''):
        if self.open:
            queue = self.queues.get((node, request), self.prompt)
            if kind == DATA:
                queue = self.queues.setdefault((node, request), collections.deque())
            queue.append((kind, node, request, payload))
            self.loop.dirty.append(self)

    def raw(self, data):
        self.rest += data
        self.loop.dirty.append(self)

    def flush(self):
        while self.open and (self.rest or self.prompt or self.queues):
            data = self.rest or self.take()
            try:
                sent = os.write(self.wfd, data)
            except OSError as e:
                if not says_again(e):
                    return self.close('cannot write: ' + e.strerror)
                sent = 0
            self.rest = data[sent:]
            if self.rest:
                self.widen(self.wfd)
                return self.loop.watch(self.wfd, writable=self.flush)
        if self.open and self.wfd in self.loop.watched:
            self.loop.watch(self.wfd, writable=None)

    # Small frames leave together, large ones as they are.
    def take(self):
        parts, size = [], 0
        while size < CHUNK and (self.prompt or self.queues):
            parts.append(self.encoded(*self.next_frame()))
            size += len(parts[-1])
        return b''.join(parts)

    def next_frame(self):
        if self.prompt:
            return self.prompt.popleft()
        key, queue = self.queues.popitem(False)
        frame = queue.popleft()
        if queue:
            self.queues[key] = queue
        return frame

    def encoded(self, kind, node, request, payload):
        flags = 0
        if self.deflater and len(payload) > 64 and (kind != DATA or is_output(payload) and shrinks(payload)):
            payload = self.deflater.compress(payload) + self.deflater.flush(zlib.Z_SYNC_FLUSH)
            flags = SQUEEZED
        return HEADER.pack(kind, flags, node, request, len(payload)) + payload

    def on_readable(self):
        try:
            data = os.read(self.rfd, PIPE)
        except OSError as e:
            if says_again(e):
                return
            data = b''
        if not data:
            return self.close('end of stream')
        if len(data) == PIPE:
            self.widen(self.rfd)
        self.feed(data)

    # A pipe that was found full is made four times as wide: fewer turns, and 15 % less CPU for a file.
    def widen(self, fd):
        if fd not in self.widened:
            self.widened.append(fd)
            try:
                fcntl.fcntl(fd, F_SETPIPE_SZ, 4 * PIPE)
            except (IOError, OSError):
                # A socket, another system, too many pipes of this user's: then it stays as it is.
                pass

    # A big frame comes in many reads: they are put together once, when the last of them is here.
    def feed(self, data):
        self.inbox.append(data)
        self.missing -= len(data)
        if self.missing > 0:
            return
        data, at = b''.join(self.inbox), 0
        try:
            while self.open:
                self.missing = at + HEADER.size - len(data)
                if self.missing > 0:
                    break
                kind, flags, node, request, size = HEADER.unpack_from(data, at)
                if kind >= len(KINDS) or flags > SQUEEZED or size > MAX_FRAME:
                    raise ProtocolError('not a frame of ours')
                self.missing += size
                if self.missing > 0:
                    break
                at += HEADER.size + size
                payload = data[at - size:at]
                self.receive(self, kind, node, request, self.inflate(payload) if flags else payload)
        except (ProtocolError, RuntimeError, zlib.error) as e:
            # A RuntimeError says that JSON is nested too deeply.
            self.close('protocol error: %s' % e)
        self.inbox = [data[at:]]

    def inflate(self, payload):
        data = self.inflater.decompress(payload, MAX_FRAME)
        if self.inflater.unconsumed_tail or self.inflater.unused_data:
            raise ProtocolError('a frame is too long')
        return data

    def close(self, why):
        if self.open:
            self.open = False
            self.prompt.clear()
            self.queues.clear()
            for fd in set((self.rfd, self.wfd)):
                self.loop.close(fd)
            self.closed(self, why)


# The pieces of files are not for us to squeeze: their sender has looked at them.
def is_output(payload):
    return payload[:1] < struct.pack('B', FILE)


def shrinks(payload):
    sample = payload[:4096]
    return len(zlib.compress(sample, 1)) < 0.9 * len(sample)


# 14 ROUTER ###########################################################################################################
# The tree of agents, as seen from one of them: a parent above, children below. What is not for us goes on, down by
# the routing table, up with the sender's number checked: a child can speak only for itself and what is below it.


class Agent(object):
    def __init__(self, core, parent_in, parent_out, squeeze):
        self.core = core                    # the compressed text of this part of the file, to start children with
        self.loop = Loop()
        self.number = 0                     # which agent we are; known from the first frame on
        self.routes = {}                    # number of an agent below us -> stream that leads there
        self.started = {}                   # Hop of an agent below us -> its number and its account
        self.calls = {}                     # request -> the Call that we serve
        self.lanes = {}                     # name of a lane -> its Calls; the first one runs, the others wait for it
        self.store = Store()
        self.spares = []                    # children that are ready to be modules
        self.cwd = working_directory()
        self.environ = first_environment()
        self.parent = Stream(self.loop, parent_in, parent_out, self.from_parent, self.orphaned, squeeze)

    def from_parent(self, stream, kind, node, request, payload):
        self.number = self.number or node
        if node == self.number:
            getattr(self, 'on_' + KINDS[kind], self.on_nonsense)(request, payload)
        elif node in self.routes:
            self.routes[node].send(kind, node, request, payload)
        elif kind == CALL:
            stream.send(FAIL, node, request, pack({'kind': 'closed', 'text': 'no such agent'}))

    def from_child(self, stream, kind, node, request, payload):
        if self.routes.get(node) is not stream or kind not in (DATA, END, ACK, REPLY, FAIL, DOWN):
            raise ProtocolError('a child agent sent what it may not send')
        if kind == DOWN:
            del self.routes[node]
        self.parent.send(kind, node, request, payload)

    def orphaned(self, stream, why):
        self.loop.running = False

    def on_nonsense(self, request, payload):
        raise ProtocolError('not for an agent')

    # The one error policy: what a handler raises becomes the reply.
    def on_call(self, request, payload):
        head, body = unpack(payload)
        call = self.calls[request] = Call(self, request, head, body)
        lane = self.lanes.setdefault(call.lane, [])
        lane.append(call)
        if len(lane) == 1:
            self.start(call)

    def start(self, call):
        try:
            make_private(call.head.get('tmpdir'))
        except OSError as e:
            return call.fail('tmpdir', describe(e))
        self.serve(call, getattr(self, 'call_' + str(call.head['call'])), call, call.body)

    def on_data(self, request, payload):
        call = self.calls.get(request)
        if call and call.on_input:
            self.serve(call, call.on_input, ord(payload[:1]), payload[1:])

    def on_end(self, request, payload):
        call = self.calls.get(request)
        if call and call.on_input:
            self.serve(call, call.on_input, STDIN, None)

    def on_ack(self, request, payload):
        call = self.calls.get(request)
        if call and call.on_ack:
            self.serve(call, call.on_ack)

    def serve(self, call, handler, *args):
        try:
            handler(*args)
        except Exception as e:
            call.fail('error', describe(e), errno=getattr(e, 'errno', None))

    def on_cancel(self, request, payload):
        if request in self.calls:
            self.calls[request].end()

    def on_blobs(self, request, payload):
        self.store.blobs.update(unpack_blobs(payload))

    def on_share(self, request, payload):
        node, = struct.unpack_from('>I', payload)
        digests = [payload[at:at + 20] for at in range(4, len(payload), 20)]
        if node in self.routes:
            self.routes[node].send(BLOBS, node, 0, pack_blobs((d, self.store.blobs[d]) for d in digests))

    def on_route(self, request, payload):
        node, = struct.unpack('>I', payload)
        self.routes[node] = self.routes[request]

    # Start an agent below us: another account, another interpreter, another machine. head: see Hop.
    def call_hop(self, call, body):
        node = call.head['node']

        def up(hello, stream):
            self.routes[node] = stream
            self.started = dict((other, names) for other, names in self.started.items() if other.code is None)
            self.started[hop] = node, hello['user']
            stream.receive = self.from_child
            call.reply(hello)

        def down(text):
            for number in [n for n, stream in self.routes.items() if stream is hop.stream]:
                del self.routes[number]
                self.parent.send(DOWN, number, 0, pack({'text': text}))

        call.head['env'] = self.environ
        hop = Hop(self.loop, call.head, self.core, self.cwd, call.data, up, call.fail_with, down)
        call.on_input, call.cleanup = hop.answer, hop.kill

    # An account is about to be removed, which a process of its own would prevent, or an agent is one too many. head:
    # name, an account or the number of an agent. End those, and wait.
    def call_retire(self, call, body):
        leaving = [hop for hop, names in self.started.items() if call.head['name'] in names]
        for hop in leaving:
            hop.end('killed', 'it was told to leave')

        def wait():
            if any(hop.code is None for hop in leaving):
                self.loop.later(0.01, wait)
            else:
                call.reply({})

        wait()

    call_exec = lambda self, call, body: start_command(self, call, body)
    call_run = lambda self, call, body: start_module(self, call, body)
    call_put = lambda self, call, body: receive_file(call, body)
    call_get = lambda self, call, body: send_file(call)
    call_remove = lambda self, call, body: remove_tree(call)


# A request that an agent serves, until its REPLY or FAIL. `cleanup` ends what it started when nobody waits any more.
class Call(object):
    def __init__(self, agent, request, head, body):
        self.agent = agent
        self.request = request
        self.head = head
        self.body = body
        self.lane = head.get('lane', request)
        self.on_input = None                # (channel, bytes; None at the end)
        self.on_ack = None                  # ()
        self.cleanup = None

    def send(self, kind, payload=b''):
        self.agent.parent.send(kind, self.agent.number, self.request, payload)

    def data(self, channel, data):
        self.send(DATA, struct.pack('B', channel) + data)

    # How many of those are waiting for the network.
    def backlog(self):
        return len(self.agent.parent.queues.get((self.agent.number, self.request), ()))

    def reply(self, head, body=b''):
        self.end(REPLY, head, body)

    def fail(self, kind, text, **more):
        self.fail_with(dict(more, kind=kind, text=text))

    def fail_with(self, head):
        self.end(FAIL, head)

    # Once. The next one in its lane begins.
    def end(self, kind=None, head=None, body=b''):
        if not self.agent.calls.pop(self.request, None):
            return
        if kind is not None:
            self.send(kind, pack(head, body))
        if kind != REPLY:
            self.abandon()
        lane = self.agent.lanes[self.lane]
        was_first = lane[0] is self
        lane.remove(self)
        if not lane:
            del self.agent.lanes[self.lane]
        elif was_first:
            self.agent.start(lane[0])

    def abandon(self):
        cleanup, self.cleanup = self.cleanup, None
        if cleanup:
            cleanup()


def describe(error):
    return '%s: %s' % (type(error).__name__, error)


# 15 CHILDREN #########################################################################################################
# Start a program on three pipes. With `terminal` it also gets a controlling pty, which is where ssh, su and doas ask
# for passwords and what sudo's requiretty looks for; it carries data only for a command that asked for a terminal.


def spawn(argv, cwd=None, env=None, terminal=False, on_terminal=False, program=None):
    pipes = [os.pipe() for _ in range(3)]
    master, slave = open_terminal() if terminal else (None, None)
    for fd in [fd for pair in pipes for fd in pair] + ([master, slave] if terminal else []):
        private(fd, blocking=True)
    pid = os.fork()
    if not pid:
        become_program(program or argv[0], argv, cwd, env, slave,
                       [slave] * 3 if on_terminal else [pipes[0][0], pipes[1][1], pipes[2][1]])
    for fd in (pipes[0][0], pipes[1][1], pipes[2][1]):
        os.close(fd)
    return pid, private(pipes[0][1]), private(pipes[1][0]), private(pipes[2][0]), terminal and private(master), slave


# In a chroot without a /dev/pts there is none: nothing is heard from a pipe, and nobody finds a terminal.
def open_terminal():
    try:
        return os.openpty()
    except OSError:
        return os.pipe()


# In the child of a fork: never returns.
def become_program(program, argv, cwd, env, slave, stdio):
    try:
        os.setsid()
        if slave is not None and os.isatty(slave):
            import termios
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        reset_signals()
        if slave in stdio:
            lead_session()
        enter(cwd)
        os.execvpe(to_fs(program), [to_fs(arg) for arg in argv], os.environ if env is None else native(env))
    except BaseException as e:
        os.write(2, ('%s: %s\n' % (argv[0], getattr(e, 'strerror', None) or e)).encode('utf-8', 'replace'))
    finally:
        os._exit(127)


# The end of a session's leader hangs up on all who sit at its terminal, also on those who are just about to leave it
# for the background. sshd, a login shell and sudo take their time to end; so do we.
def lead_session():
    pid = os.fork()
    if pid:
        close_fds()
        status = os.waitpid(pid, 0)[1]
        time.sleep(0.05)
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def reset_signals():
    signal.set_wakeup_fd(-1)
    set_handler = getattr(signal, '_signal', signal).signal     # without the enums of Python 3, each 15 us in a fork
    for number in (signal.SIGPIPE, signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
        set_handler(int(number), int(signal.SIG_DFL))


# The environment as it was when this process started: Python sets LC_CTYPE for itself where there is no locale, and
# what we start would not find out that there is none.
def first_environment():
    try:
        with open('/proc/self/environ', 'rb') as file:
            pairs = [entry.split(b'=', 1) for entry in file.read().split(b'\0') if b'=' in entry]
    except IOError:
        return dict(os.environ)
    return dict((name, value) if PY2 else (os.fsdecode(name), os.fsdecode(value)) for name, value in pairs)


def native(env):
    return dict((to_fs(name), to_fs(value)) for name, value in env.items()) if PY2 else env


# A directory that is gone or closed to us is not a reason to fail: the wrapper that Ansible sends does the same.
def enter(cwd):
    for place in (cwd, os.path.expanduser('~'), '/'):
        try:
            return os.chdir(to_fs(place)) if place else None
        except OSError:
            continue


def working_directory():
    try:
        return from_fs(os.getcwd() if PY2 else os.getcwdb())
    except OSError:
        return '/'


# A negative number is a process group.
def kill(pids, signum=signal.SIGKILL):
    for pid in pids:
        try:
            os.kill(pid, signum)
        except OSError as e:
            if e.errno not in (errno.ESRCH, errno.EPERM):
                raise


# A process, and all that it started, as far as their parents live.
def family(pid):
    found, parents = [pid], {}
    for name in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open('/proc/%s/stat' % name) as file:
                parents[int(name)] = int(file.read().rpartition(')')[2].split()[1])
        except IOError:
            continue        # it has ended
    for one in found:
        found.extend(pid for pid, parent in parents.items() if parent == one)
    return found


# b'' at the end of the stream, None when there is nothing now.
def take(fd):
    try:
        return os.read(fd, CHUNK)
    except OSError as e:
        return None if says_again(e) else b''


# What we rely on in what an agent says of itself.
def checked(hello):
    words = hello.get('names')
    if not isinstance(words, list) or not all(isinstance(word, type(u'')) for word in words + [hello.get('user')]):
        raise ProtocolError('malformed greeting')
    return hello


# A program that is to become an agent. spec: argv, cwd, env, mark (what it prints when it is ready for the core),
# eager (send the core at once: nothing on the way reads a password from stdin), patience (seconds without a sign of
# life before we give up), squeeze. Until it is up, all that it says goes to `output(channel, bytes)`, and whoever
# listens there can answer(). Ends in one up(hello, stream), later perhaps one down(text), or in one failed(head).
class Hop(object):
    def __init__(self, loop, spec, core, cwd, output, up, failed, down):
        self.loop, self.spec, self.core = loop, spec, core
        self.output, self.up, self.failed, self.down = output, up, failed, down
        self.mark = spec['mark'].encode('ascii')
        self.said = {STDOUT: b'', STDERR: b'', TTY: b''}    # the last of what it said, for error messages
        self.state = 'boot'                                 # boot, mark, up, over
        self.code = None                                    # its exit code, once it has one
        self.pid, stdin, stdout, stderr, self.tty, slave = spawn(spec['argv'], spec.get('cwd') or cwd, spec.get('env'),
                                                                 terminal=True)
        self.fds = {STDERR: stderr, TTY: self.tty}
        self.slave = slave          # held open: without one the terminal reads as hung up until ssh opens it
        self.stream = Stream(loop, stdout, stdin, self.greeted, self.hung_up, squeeze=spec.get('squeeze'))
        loop.exits[self.pid] = self.exited
        loop.watch(stdout, readable=self.read_stdout)
        loop.watch(stderr, readable=lambda: self.read(STDERR))
        loop.watch(self.tty, readable=lambda: self.read(TTY))
        self.timer = loop.later(spec['patience'], self.timed_out)
        if spec['eager']:
            self.stream.raw(core)

    # stdout up to the mark is noise of a login script, or a prompt; after the mark it is frames.
    def read_stdout(self):
        data = take(self.stream.rfd)
        if data == b'':
            return self.stream.close('end of stream')
        heard = self.said[STDOUT] + (data or b'')
        at = heard.find(self.mark)
        if at < 0:
            return self.heard(STDOUT, data)
        self.state = 'mark'
        self.said[STDOUT] = heard[:at]
        if not self.spec['eager']:
            self.stream.raw(self.core)
        self.stream.listen()
        self.stream.feed(heard[at + len(self.mark):])

    def read(self, channel):
        data = take(self.fds[channel])
        self.heard(channel, data)
        if data == b'':
            self.loop.forget(self.fds[channel])

    def heard(self, channel, data):
        if data:
            self.said[channel] = (self.said[channel] + data)[-8192:]
            if self.state in ('boot', 'mark'):
                self.be_patient()
                self.output(channel, data)

    def be_patient(self):
        cancel(self.timer)
        self.timer = self.loop.later(self.spec['patience'], self.timed_out)

    def answer(self, channel, data):
        if self.state == 'boot' and data:
            os.write(self.tty, data) if channel == TTY else self.stream.raw(data)

    def greeted(self, stream, kind, node, request, payload):
        if kind != HELLO or self.state != 'mark':
            raise ProtocolError('no greeting')
        hello = checked(unpack(payload)[0])
        cancel(self.timer)
        self.state = 'up'
        self.up(hello, stream)

    def timed_out(self):
        self.end('timeout', 'no answer for %d seconds' % self.spec['patience'])

    # An exit code says more than an end of stream: wait a little for the one when the other comes first.
    def hung_up(self, stream, why):
        if self.state != 'over':
            cancel(self.timer)
            self.timer = self.loop.later(2, lambda: self.end('exit', why))
            if self.code is not None:
                self.exited(self.code)

    def exited(self, code):
        self.code = code
        if self.stream.open:
            self.loop.later(0.2, lambda: self.stream.close('it ended'))
        else:
            self.end('exit', 'it ended with exit code %d' % code)

    # Nobody waits for it any more.
    def kill(self):
        self.failed = self.down = lambda *args: None
        self.end('killed', '')

    def end(self, kind, text):
        if self.state == 'over':
            return
        was, self.state = self.state, 'over'
        cancel(self.timer)
        self.stream.close(text)
        for channel, fd in self.fds.items():
            self.heard(channel, take(fd))
            self.loop.forget(fd)
        if self.code is None:
            self.let_go(2 if was == 'up' else 0)
        else:
            self.hang_up()
        said = dict((name, self.said[channel].decode('utf-8', 'replace'))
                    for name, channel in (('stdout', STDOUT), ('stderr', STDERR), ('tty', TTY)))
        if was == 'up':
            self.down((said['stderr'] or text).strip())
        else:
            self.failed(dict(said, kind=kind, text=text, code=self.code))

    # The end of its stdin asks an agent to go. Who does not is made to. Its terminal stays until then: ssh would take
    # the end of that for its own, and leave unsent what it was given before.
    def let_go(self, seconds):
        def gone(code):
            self.code = code
            cancel(timer)
            self.hang_up()

        timer = self.loop.later(seconds, lambda: kill([-self.pid]))
        self.loop.exits[self.pid] = gone

    def hang_up(self):
        for fd in list(self.fds.values()) + [self.slave]:
            os.close(fd)


# 16 IMPORTER #########################################################################################################
# Python modules from RAM. A table of contents maps each path of the zip that Ansible would have sent to the hash of
# its text; texts and compiled code are kept by hash, so that every fork of the agent has them.


class Store(object):
    def __init__(self):
        self.blobs = {}             # sha1 -> text
        self.tables = {}            # sha1 of a table of contents -> {path: sha1}
        self.code = {}              # (sha1, path) -> code
        self.purges = 0             # how often all that was imported from here was dropped
        self.root = '/ansible_mitogen_single_%d_payload.zip' % os.getpid()    # what stands for the zip in __file__

    def table(self, name):
        if name not in self.tables:
            text = self.blobs[from_hex(name)].decode('ascii')
            self.tables[name] = dict((str(path), from_hex(digest)) for path, digest in json.loads(text).items())
        return self.tables[name]

    def compiled(self, path, digest):
        if (digest, path) not in self.code:
            self.code[digest, path] = compile(self.blobs[digest], self.root + '/' + path, 'exec', 0, True)
        return self.code[digest, path]


def from_hex(text):
    import binascii
    return binascii.unhexlify(text)


class Importer(object):
    def __init__(self, store, table):
        self.store = store
        self.table = table
        self.loaded = {}            # name -> (path, sha1), for all that came through here

    def locate(self, name):
        base = name.replace('.', '/')
        for path, package in ((base + '/__init__.py', True), (base + '.py', False)):
            if path in self.table:
                return path, package
        return None, False

    def find_spec(self, name, path=None, target=None):
        path, package = self.locate(name)
        if path:
            import importlib.machinery
            spec = importlib.machinery.ModuleSpec(name, self, origin=self.get_filename(name), is_package=package)
            spec.has_location = True
            if package:
                spec.submodule_search_locations = [os.path.dirname(spec.origin)]
            return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        path, _ = self.locate(name)
        self.loaded[name] = path, self.table[path]
        exec(self.get_code(name), module.__dict__)
        if name in AMENDED:
            AMENDED[name](self, module)

    # Python 2, whose runpy looks for modules of a package only by way of the package's __path__.
    def hook(self, path):
        if not path.startswith(self.store.root):
            raise ImportError('not ours')
        return self

    def find_module(self, name, path=None):
        return self if self.locate(name)[0] else None

    def load_module(self, name):
        import imp
        module = sys.modules.setdefault(name, imp.new_module(name))
        module.__file__, module.__loader__ = self.get_filename(name), self
        module.__package__ = name
        if self.is_package(name):
            module.__path__ = [os.path.dirname(module.__file__)]
        else:
            module.__package__ = name.rpartition('.')[0]
        try:
            self.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        return sys.modules[name]

    # What runpy, inspect, linecache and pkgutil ask of a loader. For a name that they made up it is an ImportError.
    def found(self, name):
        path, package = self.locate(name)
        if not path:
            raise ImportError('no module of this name: %s' % name)
        return path, package

    def is_package(self, name):
        return self.found(name)[1]

    def get_filename(self, name):
        return self.store.root + '/' + self.found(name)[0]

    def get_code(self, name):
        path = self.found(name)[0]
        return self.store.compiled(path, self.table[path])

    def get_source(self, name):
        data = self.store.blobs[self.table[self.found(name)[0]]]
        return data if PY2 else data.decode('utf-8')

    def get_data(self, path):
        digest = self.table.get(path[len(self.store.root) + 1:])
        if digest is None:
            raise IOError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self.store.blobs[digest]

    def get_resource_reader(self, name):
        return Resources(self, os.path.dirname(self.locate(name)[0])) if self.is_package(name) else None

    # The zip itself, for those who need a file: a respawned module imports from it in another interpreter.
    def write_zip(self):
        import atexit
        import tempfile
        import zipfile
        path = tempfile.mkstemp('.zip', 'ansible_mitogen_single_payload_')[1]
        atexit.register(os.unlink, path)
        with zipfile.ZipFile(path, 'w') as archive:
            for name, digest in self.table.items():
                archive.writestr(name, self.store.blobs[digest])
        return path


class Resources(object):
    def __init__(self, importer, folder):
        self.importer, self.folder = importer, folder

    def open_resource(self, name):
        import io
        return io.BytesIO(self.importer.get_data('%s/%s/%s' % (self.importer.store.root, self.folder, name)))

    def resource_path(self, name):
        raise IOError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    def is_resource(self, name):
        return self.folder + '/' + name in self.importer.table

    def contents(self):
        return [path[len(self.folder) + 1:] for path in self.importer.table if os.path.dirname(path) == self.folder]


# What names the zip to another interpreter: made when the name is written down.
def amend_respawn(importer, module):
    class Zip(object):
        def __str__(self):
            return importer.write_zip()

        def __repr__(self):
            return repr(str(self))

    sys.modules['__main__']._modlib_path = module._ANSIBLE_PARENT_PATH = Zip()


# run_command looks twice, whether its program ended. One that ends between the two looks is waited for in a select of
# nothing, for the second that this may take: up to one in twelve short commands on a busy machine. And it asks for a
# function in the new process, for the sake of a umask, also where there is none; Python needs no copy of the module's
# memory for that process then, of which each page that the module goes on to use costs a fault: 4 ms of a 12 ms task.
def amend_run_command(importer, module):
    selectors = getattr(module, 'selectors', None)
    if not hasattr(selectors, 'PollSelector'):
        return
    subprocess = module.subprocess

    class PollSelector(selectors.PollSelector):
        def select(self, timeout=None):
            return selectors.PollSelector.select(self, timeout) if self.get_map() else []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            inherited = closure_of(options.get('preexec_fn'))
            if 'umask' in inherited and not inherited['umask']:
                del options['preexec_fn']
            subprocess.Popen.__init__(self, *args, **options)

    module.selectors = varied(selectors, PollSelector=PollSelector)
    if not PY2:     # where that function is what ends the ignoring of SIGPIPE
        module.subprocess = varied(subprocess, Popen=Popen)


def closure_of(function):
    names = getattr(getattr(function, '__code__', None), 'co_freevars', ())
    return dict(zip(names, [cell.cell_contents for cell in getattr(function, '__closure__', None) or ()]))


def varied(module, **changes):
    copy = type(sys)(module.__name__)
    vars(copy).update(vars(module), **changes)
    return copy


AMENDED = {'ansible.module_utils.common.respawn': amend_respawn, 'ansible.module_utils.basic': amend_run_command}


# 17 FILES ############################################################################################################
# Whole files, streamed piece by piece: by a Sender, which sits in a worker or in an agent, to the other of the two. A
# file is written beside its target and renamed when it is complete, so a broken transfer leaves the old one as it was.

WINDOW = 4 << 20        # bytes of a file that may be under way at most: ssh itself stops at 2 MiB
SLICE = 64 << 10        # .. and at least
QUEUE = 0.03            # seconds that a piece may wait on its way: a longer queue only delays others
LOOK = 16               # pieces from a look that finds no gain in compression to the next: one takes 0.1 ms


# How much may be under way follows from how long the pieces take: on an idle link just as long as the way there and
# back, on a full one as long as the queue in front of them, too. Beside a file, with always 4 MiB under way, a command
# took 4.1 s over a link of 1 MB/s, 0.4 s over one of 10 MB/s and 50 ms. So it takes 0.09 s over each, and the file no
# longer than before. With the least under way there is no queue of ours: if it still takes long, the way is long.
class Sender(object):
    def __init__(self, file, squeeze, send, over):
        self.file, self.send, self.over = file, send, over
        self.until_look = 0 if squeeze else None
        self.sent = collections.deque()     # (bytes, when) of what was not acknowledged yet
        self.under_way = 0
        self.window = 4 * SLICE
        self.fastest = float('inf')         # the shortest way there and back so far, in seconds

    def more(self):
        while self.over and self.under_way < self.window:
            data = self.file.read(min(CHUNK, self.window // 4))
            if not data:
                over, self.over = self.over, None
                return over()
            payload = self.packed(data)
            self.sent.append((len(payload), now()))
            self.under_way += len(payload)
            self.send(DATA, payload)

    def packed(self, data):
        if self.until_look == 0 and shrinks(data):
            return struct.pack('B', PACKED) + zlib.compress(data, 1)
        if self.until_look is not None:
            self.until_look = (self.until_look or LOOK) - 1
        return struct.pack('B', FILE) + data

    def taken(self):
        size, when = self.sent.popleft()
        self.under_way -= size
        took = now() - when
        self.fastest = took if self.window == SLICE else min(self.fastest, took)
        change = 0.5 * size * max(-1, 1 - (took - self.fastest) / QUEUE)
        self.window = int(max(SLICE, min(WINDOW, self.window + change)))
        self.more()


def send_file(call):
    def over():
        file.close()
        call.reply({})

    file = open(os.path.join(to_fs(call.agent.cwd), to_fs(call.head['path'])), 'rb')
    call.cleanup = file.close
    sender = Sender(file, call.head['squeeze'], call.send, over)
    call.on_ack = sender.taken
    sender.more()


# A piece as it was before it was sent.
def unpacked(channel, data):
    if channel != PACKED:
        return data
    inflater = zlib.decompressobj()
    data = inflater.decompress(data, CHUNK)
    if inflater.unconsumed_tail:
        raise ProtocolError('a piece of a file is too long')
    return data


def make_private(path):
    path = path and to_fs(path)
    if path and not os.path.isdir(path):
        umask = os.umask(0o77)
        try:
            os.makedirs(path, 0o700)
        finally:
            os.umask(umask)


def remove_tree(call):
    import shutil
    shutil.rmtree(to_fs(call.head['path']))
    call.reply({})


# A small file comes with its request.
def receive_file(call, body):
    receiver = Receiver(call)
    if not call.head['more']:
        receiver.file.write(body)
        receiver.write(FILE, None)


class Receiver(object):
    def __init__(self, call):
        self.call = call
        self.path = os.path.realpath(os.path.join(to_fs(call.agent.cwd), to_fs(call.head['path'])))
        self.part = None
        if os.path.isdir(self.path):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), call.head['path'])
        call.cleanup = self.discard
        call.on_input = self.write
        self.file = self.create()

    # In place, as sftp does it always, where another file would not be the same: a device, somebody else's file,
    # one with several names, a directory that we may not write to.
    def create(self):
        old = os.stat(self.path) if os.path.exists(self.path) else None
        if old and not (stat.S_ISREG(old.st_mode) and old.st_uid == os.geteuid() and old.st_nlink == 1):
            return open(self.path, 'wb')
        part = self.path + to_fs('.%d.%d.part' % (os.getpid(), self.call.request))
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self.call.head['mode'])
        except OSError:
            return open(self.path, 'wb')
        self.part = part
        if old:
            os.fchmod(fd, stat.S_IMODE(old.st_mode))
        return os.fdopen(fd, 'wb')

    def write(self, channel, data):
        if data is not None:
            self.file.write(unpacked(channel, data))
            return self.call.send(ACK)
        self.file.close()
        if self.part:
            os.rename(self.part, self.path)
        self.part = None
        self.call.reply({})

    def discard(self):
        self.file.close()
        if self.part:
            os.unlink(self.part)


# 18 RUNNER ###########################################################################################################
# Commands, and modules. These run in forks of the agent, which has imported what modules have in common: 8 ms where a
# new interpreter takes 150. Those that leave their process as it was follow each other in one: 3 ms.

SMALL = 16 << 10        # bytes of output that can wait for the end of what prints them
AGAIN = b'+'            # follows the exit code of a module whose process waits for the next one
BACKLOG = 8             # pieces of output waiting for the network above which the rest is left in its pipe


class Job(object):
    def __init__(self, call, pid, stdin, outputs, spare=None):
        self.call = call
        self.loop = call.agent.loop
        self.pid = pid
        self.outputs = outputs              # channel -> fd
        self.stdin = stdin
        self.small = {}                     # channel -> output that was not sent yet
        self.spare = spare                  # which became this module
        self.ends = [spare.order, spare.report] if spare else []
        self.input = collections.deque()
        self.input_over = False
        call.cleanup = self.kill
        self.loop.exits[pid] = self.exited
        for channel, fd in outputs.items():
            self.watch(channel, fd)
        if spare:
            self.loop.watch(spare.report, readable=self.done)

    # The exit code comes in front of the exit, which takes an interpreter 1 ms, or in the place of one.
    def done(self):
        code = take(self.spare.report)
        if code:
            self.loop.exits[self.pid] = lambda code: None
            self.exited(ord(code[:1]), code[1:] == AGAIN)
        else:
            self.loop.forget(self.spare.report)

    def watch(self, channel, fd):
        self.loop.watch(fd, readable=lambda: self.read(channel, fd))

    def read(self, channel, fd):
        if self.call.backlog() > BACKLOG:
            self.loop.forget(fd)
            return self.loop.later(0.02, lambda: fd in self.outputs.values() and self.watch(channel, fd))
        self.pump(channel, fd)

    # A little output waits for the reply: two small packets in a row cost 40 ms, Nagle waiting for a delayed ACK.
    def pump(self, channel, fd):
        data = take(fd)
        if data:
            self.small[channel] = self.small.get(channel, b'') + data
            if len(self.small[channel]) > SMALL:
                self.call.data(channel, self.small.pop(channel))
        elif data == b'':
            self.loop.close(fd)
            del self.outputs[channel]
        return data

    def write(self, channel, data):
        if data is None:
            self.input_over = True
        elif self.stdin is not None:
            self.input.append(data)
        self.flush()

    def flush(self):
        try:
            while self.stdin is not None and self.input:
                data = self.input.popleft()
                sent = os.write(self.stdin, data)
                if sent < len(data):
                    self.input.appendleft(data[sent:])
        except OSError as e:
            if says_again(e):
                self.input.appendleft(data)
                return self.loop.watch(self.stdin, writable=self.flush)
            self.input.clear()
        if self.input_over and self.stdin is not None:
            self.loop.close(self.stdin)
            self.stdin = None

    # What it wrote before its end is in the pipes by now. What background processes that it left behind still write
    # is theirs: as long as they hold the pipes nobody else waits for them.
    def exited(self, code, again=False):
        for channel, fd in list(self.outputs.items()):
            while self.pump(channel, fd):
                pass
        again = again and self.spare.runs < 100 and len(self.outputs) == 2 and len(self.call.agent.spares) < 8
        self.release(self.loop.forget if again else self.loop.close)
        if again:
            add_spare(self.call.agent, self.spare)
        for channel, data in self.small.items():
            self.call.data(channel, data)
        self.call.cleanup = None
        self.call.reply({'rc': code})

    def release(self, close):
        for fd in list(self.outputs.values()) + self.ends + [self.stdin]:
            if fd is not None:
                close(fd)
        self.outputs, self.ends, self.stdin = {}, [], None

    # What an earlier module left running in the same process group is none of its business.
    def kill(self):
        pids = family(self.pid) if self.spare and self.spare.runs > 1 else [-self.pid]
        self.loop.exits[self.pid] = lambda code: None
        self.release(self.loop.close)
        kill(pids, signal.SIGTERM)
        self.loop.later(0.5, lambda: kill(pids))


# head: argv, cwd, tty. One word is a line for the login shell. body: the start of its stdin; more may follow as
# DATA until END.
def start_command(agent, call, body):
    tty = call.head.get('tty')
    argv, program = call.head['argv'], None
    if len(argv) == 1:
        program = greeting()['shell']
        argv = [os.path.basename(program), '-c'] + argv
    pid, stdin, stdout, stderr, master, slave = spawn(argv, call.head.get('cwd') or agent.cwd, agent.environ, tty,
                                                      tty, program)
    outputs = {STDOUT: stdout, STDERR: stderr}
    if tty:
        for fd in (stdin, stdout, stderr, slave):
            os.close(fd)
        stdin, outputs = None, {STDOUT: master}
    job = Job(call, pid, stdin, outputs)
    call.on_input = job.write
    if body:
        job.write(STDIN, body)
    if not call.head.get('more'):
        job.write(STDIN, None)


# head: toc, fqn, profile, rlimit, env, cwd, again, more. body: the module's parameters as Ansible encoded them.
def start_module(agent, call, body):
    params = [body]

    def more(channel, data):
        if data is None:
            fork_module(agent, call, b''.join(params))
        else:
            params.append(data)

    call.on_input = more
    if not call.head.get('more'):
        more(STDIN, None)


def fork_module(agent, call, params):
    call.on_input = None
    importer = warm(agent, call.head['toc'])
    spare = take_spare(agent, importer, call.head)
    Job(call, spare.pid, None, {STDOUT: spare.stdout, STDERR: spare.stderr}, spare)
    spare.set_off(call.head, params)
    if not call.head['again']:      # or its own process can be used again, with what that has compiled
        agent.loop.idle.extend(lambda p=path, d=digest: compile_ahead(agent.store, p, d)
                               for path, digest in importer.table.items() if (digest, path) not in agent.store.code)
    agent.loop.idle.append(lambda: call.head['again'] and spare.has.issuperset(agent.store.blobs)
                           or add_spare(agent, take_spare(agent, importer, call.head)))


# A fork of the agent that waits to be told which module it is. It is made while the agent has nothing else to do: a
# fork and the page faults that follow it are 4 ms of a 12 ms task. After a module that is known to leave its process as
# it was, it waits for the next one of these. Not for ever: it might have grown.
class Spare(object):
    def __init__(self, agent, importer):
        self.runs = 0                       # modules so far
        self.has = set(agent.store.blobs)   # the sources that are in its memory
        self.purges = agent.store.purges
        (order, self.order), outputs = os.pipe(), [os.pipe() for _ in range(3)]
        self.pid = os.fork()
        if not self.pid:
            run_spare(agent, importer, order, *[theirs for ours, theirs in outputs])
        for fd in [order] + [theirs for ours, theirs in outputs]:
            os.close(fd)
        self.stdout, self.stderr, self.report = [private(ours) for ours, theirs in outputs]

    def set_off(self, head, params):
        self.runs += 1
        text = pack(head, params)
        text = struct.pack('>I', len(text)) + text
        while text:
            text = text[os.write(self.order, text):]


# One that has the table of contents of this module, and all it names; a new one, if there is none.
def take_spare(agent, importer, head):
    table = [from_hex(head['toc'])] + list(importer.table.values())
    for spare in sorted(agent.spares, key=lambda spare: -spare.runs):
        if spare.purges < agent.store.purges or not spare.has.issuperset(table):
            discard(agent, spare)           # a new one can do all that it could
        elif head['again'] or not spare.runs:
            agent.spares.remove(spare)
            return spare
    return Spare(agent, importer)


def add_spare(agent, spare):
    agent.spares.append(spare)
    agent.loop.exits[spare.pid] = lambda code: discard(agent, spare)


def discard(agent, spare):
    if spare in agent.spares:
        agent.spares.remove(spare)
        for fd in (spare.order, spare.stdout, spare.stderr, spare.report):
            os.close(fd)


def compile_ahead(store, path, digest):
    try:
        store.compiled(path, digest)
    except SyntaxError:
        # Written for another version of Python. The module that imports it all the same will say so.
        pass


LOADER = 'ansible.module_utils._internal._ansiballz._loader'    # since ansible-core 2.19 it runs the module
COMMON = ('ansible.module_utils.basic', LOADER, 'ansible.modules', 'glob', 'runpy')


# Have in memory what nearly every module imports. What fails here fails again in the child, which reports it.
def warm(agent, toc):
    table = agent.store.table(toc)
    finder = next((f for f in sys.meta_path if isinstance(f, Importer)), None)
    if finder is None:
        finder = Importer(agent.store, table)
        sys.meta_path.insert(0, finder)
        if PY2:
            sys.path_hooks.insert(0, finder.hook)
    if not fits(finder, table):
        purge(finder)
    finder.table = table
    if 'ansible.module_utils.basic' not in sys.modules:
        printed, sys.stdout = sys.stdout, open(os.devnull, 'w')     # basic prints, and exits, where Python is too old
        try:
            for name in COMMON + tuple(path[:-3].replace('/', '.') for path in sorted(table) if '/_profiles/_' in path):
                if '.' not in name or finder.locate(name)[0]:
                    __import__(name)
            # Which class is a Mapping or a Sequence would be found out anew in each fork: 0.5 ms of 8.
            sys.modules['ansible.module_utils.basic'].remove_values({'': ['', 1, None]}, ())
        except BaseException:
            purge(finder)
        finally:
            sys.stdout = printed
        if hasattr(gc, 'freeze'):
            gc.freeze()     # or the first collection in each fork copies all that it inherited
    return finder


# Whether all that is imported is what this module would import itself.
def fits(finder, table):
    return all(table.get(path) == digest for path, digest in finder.loaded.values())


def purge(finder):
    for name in list(sys.modules):
        if name.split('.')[0] in ('ansible', 'ansible_collections'):
            del sys.modules[name]
    finder.loaded.clear()
    finder.store.purges += 1


# In the child of a fork, never returns: become what a module expects to be, with nothing left of the agent, and do what
# the wrapper does that Ansible would have sent. Then end, or wait for the next order.
def run_spare(agent, importer, order, stdout, stderr, report):
    before = None
    try:
        os.setsid()
        reset_signals()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd, number in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
            os.dup2(fd, number)
        close_fds(order, private(report, blocking=True))
        orders = os.fdopen(order, 'rb')
        while True:
            size = orders.read(4)
            if not size:
                os._exit(0)
            head, params = unpack(orders.read(struct.unpack('>I', size)[0]))
            importer.table = agent.store.table(head['toc'])
            before = head['again'] and HAS_PROC and (before or Before(importer.loaded))
            if not before:
                close_fds()     # which the module might find and take for its own; its end says enough
            code = wind_up(run_module(agent, importer, head, params), not before)
            if code or not before:
                break
            before.restore()
            os.write(report, b'\0' + AGAIN)
    except BaseException:
        import traceback
        traceback.print_exc()
        code = wind_up(1, True)
    if before:
        os.write(report, struct.pack('B', code))
    os._exit(code)


# -> exit code, or what Python makes one of
def run_module(agent, importer, head, params):
    import random
    root = importer.store.root
    os.environ.update(native(head['env']))
    time.tzset()        # /etc/localtime may be another one by now
    enter(head.get('cwd') or agent.cwd)
    if head['rlimit']:
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, head['rlimit']), hard))
    random.seed()       # which a fork inherits, up to Python 3.6
    sys.executable = head['interpreter'][0]
    sys.argv[:] = ['']
    sys.path[:] = [root] + [p for p in sys.path if p not in ('', '.')]
    try:
        if importer.locate(LOADER)[0]:
            from ansible.module_utils._internal._ansiballz import _loader
            _loader.run_module(json_params=params, profile=head['profile'], module_fqn=head['fqn'], modlib_path=root,
                               extensions={})
        else:
            run_legacy(params, str(head['fqn']), root)
    except SystemExit as e:
        return e.code


HAS_PROC = os.path.exists('/proc/self')     # where family() finds whom to kill
PLAIN = type(None), bool, int, dict, list


# What Ansible's own modules change in their process, to undo it: place, umask, environment, search path, the hook for
# exceptions, and plain values in module_utils, as the warnings that go with a result. filecmp keeps what it compared,
# tempfile the directory that the environment named.
class Before(object):
    def __init__(self, loaded):
        import copy
        import tempfile
        self.mask = os.umask(0o77)
        os.umask(self.mask)
        self.environ, self.path, self.modules = dict(os.environ), sys.path[:], set(sys.modules)
        self.values = [(names, name, value, copy.copy(value))
                       for names in [vars(tempfile)] + [vars(sys.modules[name]) for name in loaded]
                       for name, value in names.items() if type(value) in PLAIN and name[:2] != '__']

    def restore(self):
        os.chdir('/')
        os.umask(self.mask)
        os.environ.clear()
        os.environ.update(self.environ)
        sys.path[:], sys.excepthook = self.path, sys.__excepthook__
        for name in set(sys.modules) - self.modules:
            if name[:7] in ('ansible', 'filecmp'):
                del sys.modules[name]
        for names, name, value, content in self.values:
            if type(value) in (dict, list):
                getattr(value, 'clear', int)()      # which a list of Python 2 does not need
                value.__init__(content)
            names[name] = value


def close_fds(*kept):
    try:
        fds = [int(name) for name in os.listdir('/dev/fd')]
    except OSError:
        fds = range(256)
    for fd in fds:
        if fd > 2 and fd not in kept:
            try:
                os.close(fd)
            except OSError as e:
                if e.errno != errno.EBADF:
                    raise


def run_legacy(params, fqn, root):
    import runpy
    from ansible.module_utils import basic
    basic._ANSIBLE_ARGS = params
    runpy.run_module(mod_name=fqn, init_globals=dict(_module_fqn=fqn, _modlib_path=root), run_name='__main__',
                     alter_sys=True)
    print('{"msg": "New-style module did not handle its own exit", "failed": true}')
    sys.exit(1)


# What the end of an interpreter does, less the freeing of memory: threads, atexit, buffers, exit code.
def wind_up(code, last):
    import atexit
    import threading
    try:
        if last:
            threading._shutdown()
        atexit._run_exitfuncs()
        if code is not None and not isinstance(code, int):
            sys.stderr.write('%s\n' % (code,))
            code = 1
        for file in (sys.stdout, sys.stderr):
            if file and not file.closed:
                file.flush()
    except Exception:
        code = code or 120
        import traceback
        traceback.print_exc()
    return (code or 0) & 255


# 19 MAIN #############################################################################################################
# What the first stage calls, with the compressed text that it has just run: keep stdio out of everybody's reach,
# say hello, serve until the parent is gone, take everything along.


def main(core, squeeze):
    stdin, stdout = private(os.dup(0)), private(os.dup(1))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    agent = Agent(core, stdin, stdout, squeeze)
    os.chdir('/')
    for name in ('SIGHUP', 'SIGINT', 'SIGTTOU', 'SIGPIPE'):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    agent.loop.start()
    agent.parent.listen()
    agent.parent.send(HELLO, 0, 0, pack(greeting()))
    while agent.loop.running:
        agent.loop.turn()
    farewell(agent)


def greeting():
    import pwd
    try:
        user = pwd.getpwuid(os.getuid())
        name, home, shell = user.pw_name, user.pw_dir, user.pw_shell
    except KeyError:
        name, home, shell = str(os.getuid()), os.path.expanduser('~'), '/bin/sh'
    return {'pid': os.getpid(), 'python': list(sys.version_info[:3]), 'executable': sys.executable, 'user': name,
            'home': home, 'shell': shell, 'names': other_names()}


# The names under which this very interpreter can be called: a link to it, unless a venv lies around the link.
def other_names():
    real = os.path.realpath(sys.executable)
    found = [sys.executable]
    for place in os.environ.get('PATH', '').split(':') + ['/usr/bin', '/usr/local/bin']:
        for name in ('python', 'python%d' % sys.version_info[0], 'python%d.%d' % sys.version_info[:2]):
            path = place + '/' + name
            if os.path.realpath(path) == real and not os.path.exists(place + '/../pyvenv.cfg'):
                found.append(path)
    return found


def farewell(agent):
    for call in list(agent.calls.values()):
        call.abandon()
    for spare in agent.spares[:]:
        discard(agent, spare)
    for stream in set(agent.routes.values()):
        stream.close('the parent is gone')
    end = now() + 3
    while agent.loop.exits and now() < end:
        agent.loop.idle.clear()
        agent.loop.later(0.1, lambda: None)
        agent.loop.turn()
    os._exit(0)


# ======== everything below this line is sent by itself, to targets that are to run it: same rules, no other section ===
# 20 JOB ##############################################################################################################
# An asynchronous task. Ansible's own async_wrapper detaches itself, writes the file of the job, and ends what has run
# for too long. But the module that it starts is neither a file nor a new interpreter: it is a fork, and in RAM. It runs
# as a module itself, so the runner is out of its reach, and how a module begins and ends stands here in short.
import atexit
import importlib
import io
import json
import os
import runpy
import sys
import threading
import traceback


# What the agent runs as a module, see job_payload(). Its parameters: {argv, wrapper[, fqn, profile, params]}.
def run_job(root):
    from ansible.module_utils import basic
    order, starter = json.loads(basic._ANSIBLE_ARGS.decode('utf-8')), os.getpid()
    sys.argv[:] = order['argv']
    wrapper = importlib.import_module(order['wrapper'])
    if 'fqn' in order:
        wrapper.subprocess = Programs(order, root)
        wrapper._get_interpreter = lambda path: None        # up to ansible-core 2.20
    try:
        wrapper.main()
    finally:
        if os.getpid() != starter:
            os._exit(0)     # it was the job: the agent has its answer already


# For async_wrapper, in the place of the subprocess module: the one program that it starts is the module.
class Programs(object):
    PIPE = None

    def __init__(self, order, root):
        self.order = order
        self.root = root

    def Popen(self, argv, text=False, **options):
        (stdout, out), (stderr, err) = os.pipe(), os.pipe()
        os.setpgid(0, 0)        # which is to be killed when time is over; async_wrapper does it, too, maybe too late
        if not os.fork():
            run_started(self.order, self.root, out, err)
        os.close(out)
        os.close(err)
        return Started([open_text(fd) if text else os.fdopen(fd, 'rb') for fd in (stdout, stderr)])


def open_text(fd):
    return io.open(fd, encoding='utf-8', errors='surrogateescape')


class Started(object):
    def __init__(self, files):
        self.files = files
        self.texts = [None, None]

    def communicate(self):
        reader = threading.Thread(target=self.read, args=(1,))
        reader.start()
        self.read(0)
        reader.join()
        os.wait()
        return self.texts

    def read(self, n):
        self.texts[n] = self.files[n].read()


# In the fork, never returns: stdin at its end, no other files, and the end of an interpreter.
def run_started(order, root, out, err):
    for fd, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(fd, number)
    os.closerange(3, 256)
    sys.argv[:] = order['argv'][-1:]
    try:
        run_from_ram(order['fqn'], order['params'].encode('utf-8'), order['profile'], root)
    except SystemExit as e:
        if not isinstance(e.code, (int, type(None))):
            sys.stderr.write('%s\n' % (e.code,))
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def run_from_ram(fqn, params, profile, root):
    if profile:     # since ansible-core 2.19
        from ansible.module_utils._internal._ansiballz import _loader
        _loader.run_module(json_params=params, profile=profile, module_fqn=fqn, modlib_path=root, extensions={})
    else:
        from ansible.module_utils import basic
        basic._ANSIBLE_ARGS = params
        runpy.run_module(fqn, dict(_module_fqn=fqn, _modlib_path=root), '__main__', True)


if __name__ == '__main__':
    sys.exit(command_line(sys.argv[1:]))
