"""
The tests and the benchmark of mitogen_single.py.

    python3 test_single.py                      all tests, on the newest ansible-core
    python3 test_single.py --matrix             ... and what depends on Ansible on older ones, some on all of them
    python3 test_single.py --slow               ... and those that take gigabytes, hours or the network
    python3 test_single.py -k PATTERN           those whose name matches
    python3 test_single.py RealFiles.test_copy  plain unittest names work too
    python3 test_single.py bench [WORKLOAD ...] [--runs N] [--engines stock,mitogen,plugin]
    python3 test_single.py conformance [TARGET ...]     ansible-core's own integration targets
    python3 test_single.py playbooks [GLOB ...]         playbooks of DebOps

Nothing need be installed but Python 3.9 or newer.  The first run makes one virtual environment for
each ansible-core under .lab/ (MITOGEN_SINGLE_TEST_VENVS names another directory to take them from),
and, as root on Debian, installs the servers it lacks.

Real* tests run ansible-playbook against a real sshd on a loopback port, real accounts and a real
sudo: first by stock Ansible, then by the plugin, and compare everything that Ansible reports and
everything that changed on the target.  The oracle is Ansible itself.  Every play of the plugin must
also leave nothing behind: no process, no temporary directory.

What is skipped, and why: without root there are no other accounts, so become, password logins and
broken homes are skipped; a Python or a package that the machine neither has nor can install skips
what needs it.  Each skip prints its reason in one line.  With CI=true a skip for any other reason
than those in EXPLAINED is a failure.

MITOGEN_SINGLE_TEST_ENGINE=stock puts stock Ansible in the plugin's place: all comparisons must
still pass, which proves that they compare nothing that varies by itself.

    §  section      what lives there
    1  FACTS        versions, paths, tunables
    2  VENVS        find Pythons, install ansible-core, Mitogen and collections
    3  LAB          accounts, sshd, sudoers, keys; and all of it taken away again
    4  PLAY         run one ansible command in a directory of its own, and what it left behind
    5  RECORD       the callback that writes down everything Ansible reports; the normal form
    6  COMPARE      the base class of all Real tests: stock, then plugin, then compare
    7  TEXT         the source of mitogen_single.py as text
    8  PIPE         the core alone, in each Python found, over pipes
    9  FACE         install paths, ansible-doc, ad hoc, console, the file's own commands
    10 CONNECTIONS  ssh: options, passwords, keys; docker, chroot, nsenter; the user's own
    11 BECOME       sudo and su, with every kind of trouble
    12 MODULES      where they come from, how they run, how they die
    13 STYLES       old-style, WANT_JSON, binary; raw, script, async
    14 FILES        copy, template, fetch, unarchive, assemble, slurp, synchronize
    15 CONTROL      local, delegation, blocks, handlers, loops, reconnecting
    16 FAILURES     what goes wrong on networks and machines
    17 LEFTOVERS    Ctrl-C and kill -9
    18 WORLD        one long playbook with everything in it
    19 PYTHONS      every Python found as target
    20 BENCH        stock, Mitogen and the plugin in turn; the delaying proxy
    21 CONFORMANCE  ansible-core's own integration targets, by stock and by the plugin
    22 PLAYBOOKS    playbooks that others wrote, by stock and by the plugin
    23 MAIN         the command line
"""
import argparse
import ast
import asyncio
import atexit
import collections
import difflib
import fcntl
import getpass
import glob
import hashlib
import io
import itertools
import json
import os
import pwd
import re
import resource
import secrets
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import tokenize
import unittest
import zipfile
import zlib


# 1 FACTS ########################################################################################

HERE = os.path.dirname(os.path.abspath(__file__))
PLUGIN = os.path.join(HERE, 'mitogen_single.py')
CACHE = os.path.join(HERE, '.lab')              # git-ignored; venvs and collections, kept between runs
VENVS = os.environ.get('MITOGEN_SINGLE_TEST_VENVS', os.path.join(CACHE, 'venvs'))
ENGINE = os.environ.get('MITOGEN_SINGLE_TEST_ENGINE', 'plugin')
ROOT = os.geteuid() == 0

CORES = {                                       # ansible-core: controller Pythons, best first
    '2.16': ('3.11', '3.12', '3.10'),
    '2.17': ('3.12', '3.11', '3.10'),
    '2.18': ('3.12', '3.13', '3.11'),
    '2.19': ('3.12', '3.13', '3.11'),
    '2.20': ('3.13', '3.12', '3.14'),
    '2.21': ('3.13', '3.12', '3.14'),
}
# All tests on all of them take hours.  What depends on an ansible-core by nature runs on every one, quick classes on
# two more, which between them do alike what they test, and long ones on the one that differs most from the newest.
TELLING_CORES = ('2.16', '2.19')
OLDEST_CORE = ('2.16',)
NEWEST = '2.21'
OLDEST = '2.16'
MITOGEN = '0.3.54'
BUNDLE = 'ansible==12.3.0'                      # only its collections are used
TARGETS = {'2.16': '2.7 3.6', '2.17': '3.7', '2.18': '3.8', '2.19': '3.8', '2.20': '3.9',
           '2.21': '3.9'}                       # oldest target Pythons of each

PLAY_SECONDS = 150                              # a play that takes longer hangs
LEFTOVER_SECONDS = 5                            # the promise: gone by then
CORE_BYTES = 13 * 1024                          # the promise: core as shipped, compressed

EXPLAINED = (                                   # skips that CI accepts, by the start of their reason
    'slow: ',
    'no plugin: ',
    'engine is stock: ',
    'not on this ansible-core: ',
)


def without_root():
    """Reason to skip what needs other accounts, or None."""
    return None if ROOT else 'needs root: other accounts'


def note(text):
    print(text, file=sys.stderr, flush=True)


def sh(*argv, **kwargs):
    """Run argv; its output is shown only where it fails."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    if done.returncode:
        raise RuntimeError('%s: exit %d\n%s' % (
            ' '.join(argv), done.returncode, done.stdout.decode('utf-8', 'replace')[-3000:]))
    return done.stdout.decode('utf-8', 'replace')


# 2 VENVS ########################################################################################
# Nothing here runs before the first test that needs it: `test_single.py -k Text` is instant.

def pythons():
    """Every Python of this machine: {'3.11': '/usr/bin/python3.11', ...}, 2.7 included."""
    places = os.environ.get('PATH', '').split(':') + sorted(
        glob.glob(os.path.expanduser('~/.pyenv/versions/*/bin')), reverse=True)
    found = {}
    for place in places:
        for path in glob.glob(os.path.join(place, 'python[23].[0-9]*')):
            name = os.path.basename(path)[len('python'):]
            if re.fullmatch(r'\d\.\d+', name) and name not in found and 'shims' not in path:
                found[name] = path
    return found


def by_version(names):
    return sorted(names, key=lambda name: [int(part) for part in name.split('.')])


def venv(core):
    """The directory of the virtual environment that has this ansible-core; made at first use."""
    path = os.path.join(VENVS, core)
    if not os.path.exists(os.path.join(path, 'bin', 'ansible-playbook')):
        make_venv(path, core)
    return path


def make_venv(path, core):
    have = pythons()
    python = next((have[name] for name in CORES[core] if name in have), None)
    if python is None:
        raise unittest.SkipTest('no Python for ansible-core %s: needs one of %s' % (
            core, ', '.join(CORES[core])))
    note('making a virtual environment: %s' % path)
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        sh(python, '-m', 'venv', path)
        sh(os.path.join(path, 'bin', 'pip'), 'install', '-q', 'ansible-core==%s.*' % core)
    except RuntimeError:
        shutil.rmtree(path, ignore_errors=True)
        raise


def mitogen():
    """The directory with the packages of Mitogen, the peer; fetched at first use."""
    path = os.path.join(VENVS, 'mitogen-' + MITOGEN)
    if not os.path.exists(os.path.join(path, 'ansible_mitogen')):
        note('fetching Mitogen: %s' % path)
        sh(os.path.join(venv(NEWEST), 'bin', 'pip'), 'install', '-q', '--no-deps', '--target', path, 'mitogen==' + MITOGEN)
    return path


BUNDLED = ('ansible/posix', 'community/general', 'community/docker', 'community/libvirt', 'community/okd',
           'containers/podman', 'kubernetes/core',
           # and what DebOps needs besides
           'ansible/utils', 'community/crypto', 'community/mysql', 'community/postgresql', 'community/rabbitmq')


def collections_path():
    """A directory with the collections of BUNDLED, or None where PyPI is out of reach."""
    path = os.path.join(CACHE, 'collections')
    if not all(os.path.isdir(os.path.join(path, 'ansible_collections', name)) for name in BUNDLED):
        try:
            fetch_collections(path)
        except (RuntimeError, OSError) as error:
            note('no collections: %s' % str(error).splitlines()[0])
            return None
    return path


def fetch_collections(path):
    """Take a few collections out of the `ansible` wheel: 6 MB of 54, and no Galaxy server."""
    wanted = tuple('ansible_collections/%s/' % name for name in BUNDLED)
    with tempfile.TemporaryDirectory() as scratch:
        sh(os.path.join(venv(NEWEST), 'bin', 'pip'), 'download', '-q', '--no-deps', '-d', scratch, BUNDLE)
        with zipfile.ZipFile(glob.glob(os.path.join(scratch, '*.whl'))[0]) as wheel:
            wheel.extractall(path, [name for name in wheel.namelist() if name.startswith(wanted)])


# 3 LAB ##########################################################################################
# Accounts, an sshd of our own, and the logs that count logins and sudos.  `Lab.up` is called by the
# first test that needs it; `Lab.down` at exit, however the run ends.

MARK = 'account of the mitogen_single tests'    # in GECOS: only accounts with it are ever removed

# Out of the way: leftovers are found, and killed, by the uid of their process. Another number keeps apart two runs that
# see each other's processes but have accounts of their own, in containers say.
FIRST_UID = int(os.environ.get('MITOGEN_SINGLE_TEST_UID', 48370))
ACCOUNTS = ('mslab',        # login; sudo without password
            'mspass',       # login; sudo asks for the password, after a lecture, every time
            'mstty',        # login; sudo demands a terminal
            'msapp',        # become target
            'msapp2',       # become target
            'msnoisy',      # login; its .bashrc prints, a banner greets
            'msbare',       # login into a root directory that has no Python
            'msrohome')     # login; cannot write to its home

SSHD_CONFIG = '''
Port %(port)d
ListenAddress 0.0.0.0
AllowUsers *@127.*
HostKey %(root)s/host_key
PidFile none
AuthorizedKeysFile %(root)s/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication %(passwords)s
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
LogLevel VERBOSE
MaxStartups 400
MaxSessions 100
UseDNS no
PrintMotd no
Subsystem sftp internal-sftp
'''

SSHD_MATCHES = '''
Match User msnoisy
    Banner %(root)s/banner
Match User msbare
    ChrootDirectory %(bare)s
'''

SUDOERS = '''
Defaults:mslab,mspass,mstty logfile=%(root)s/sudo.log, loglinelen=0, !syslog
Defaults:mspass lecture=always, timestamp_timeout=0, pwfeedback
Defaults:mstty requiretty
mslab ALL=(ALL) NOPASSWD: ALL
mspass ALL=(ALL) ALL
mstty ALL=(ALL) NOPASSWD: ALL
'''

DOAS_CONF = '/etc/doas.conf'
DOAS_RULES = '# %s\npermit nopass mslab\npermit mspass\n' % MARK

BARE_ROOT = '/home/msbare'      # sshd wants all of the path to be root's: no directory under /var/tmp will do
BARE_PROGRAMS = 'sh cat id mkdir chmod hostname uname ls rm'


class Lab:
    SUDOERS_FILE = '/etc/sudoers.d/mitogen_single_test'

    def __init__(self):
        self.root = None            # everything of the lab lives below; readable by its accounts
        self.failed = None          # why there is no lab
        self.login = None           # the account that plays log in to by default
        self.password = None        # of every account
        self.port = None            # of the first sshd
        self.sshds = []             # every sshd that we started
        self.docker = None          # a Docker, from the first test on that needs it
        self.lock = None            # held while the lab stands
        self.plays = 0              # counts the directories of plays

    def up(self):
        """Start at the first call; raise SkipTest with the same reason at every call if it cannot."""
        if self.root is None and self.failed is None:
            try:
                self.start()
            except (RuntimeError, OSError) as error:
                self.failed = 'no lab: %s' % error
        if self.failed:
            raise unittest.SkipTest(self.failed)
        return self

    def start(self):
        install_packages(BASE_PACKAGES)
        self.take_lock()
        self.make_root('mslab' if ROOT else getpass.getuser())
        self.password = secrets.token_hex(8)
        if ROOT:
            self.make_accounts()
            self.make_bare_root()
        self.port = self.sshd().port

    def make_root(self, login):
        """A directory with keys: all that is wanted where targets are machines with accounts of their own."""
        atexit.register(self.down)
        self.root = tempfile.mkdtemp(prefix='ms', dir='/var/tmp')
        os.chmod(self.root, 0o755)
        self.login = login
        self.make_keys()

    def down(self):
        root, self.root = self.root, None
        if root is None:
            return
        for server in self.sshds + [self.docker] * bool(self.docker):
            server.stop()
        if ROOT and self.lock:
            remove_accounts()
            if os.path.exists(self.SUDOERS_FILE):
                os.unlink(self.SUDOERS_FILE)
            if os.path.exists(DOAS_CONF) and open(DOAS_CONF).read() == DOAS_RULES:
                os.unlink(DOAS_CONF)
        shutil.rmtree(root, ignore_errors=True)

    def tree(self):
        """A root directory with a Python, a sudo and the accounts of the lab."""
        if not os.path.exists(self.path('tree')):
            make_tree(self.path('tree'))
        return self.path('tree')

    def container(self):
        """A Docker of our own, with one container of that tree."""
        if not self.docker:
            install_packages({'dockerd': 'docker.io'})
            self.docker = Docker(self)
        return self.docker

    def take_lock(self):
        """Two runs at once would take each other's accounts away: the second one waits."""
        self.lock = open('/var/tmp/mitogen_single_test.%d.lock' % os.geteuid(), 'w')
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note('another run of the tests has the lab: waiting for it')
            fcntl.flock(self.lock, fcntl.LOCK_EX)

    def make_accounts(self):
        remove_accounts()
        for number, name in enumerate(ACCOUNTS):
            sh('useradd', '-m', '-s', '/bin/bash', '-c', MARK, '-u', str(FIRST_UID + number), name)
        lines = ''.join('%s:%s\n' % (name, self.password) for name in ACCOUNTS)
        sh('chpasswd', input=lines.encode())
        with open(self.SUDOERS_FILE, 'w') as file:
            os.fchmod(file.fileno(), 0o440)
            file.write(SUDOERS % {'root': self.root})
        sh('visudo', '-c', '-q', '-f', self.SUDOERS_FILE)
        if not os.path.exists(DOAS_CONF):
            with open(DOAS_CONF, 'w') as file:
                file.write(DOAS_RULES)
        self.write('sudo.log', '')
        self.write('banner', 'A banner of several lines.\n{"not": "a result"}\n')
        with open('/home/msnoisy/.bashrc', 'w') as file:
            file.write('echo noise on stdout\necho noise on stderr >&2\n')
        shutil.rmtree('/home/msrohome')
        os.mkdir('/home/msrohome', 0o555)

    def make_bare_root(self):
        """A root directory without any Python, with just what the shell commands of Ansible use."""
        bare = BARE_ROOT
        shutil.rmtree(bare)
        for folder in ('bin', 'dev', 'tmp', 'home/msbare', 'usr'):
            os.makedirs(os.path.join(bare, folder))
        os.symlink('../bin', os.path.join(bare, 'usr', 'bin'))
        os.chmod(os.path.join(bare, 'tmp'), 0o1777)
        shutil.chown(os.path.join(bare, 'home/msbare'), 'msbare')
        for program in BARE_PROGRAMS.split():
            self.copy_with_libraries(shutil.which(program), bare)
        shutil.copy(os.path.join(bare, 'bin/sh'), os.path.join(bare, 'bin/bash'))
        os.mkdir(os.path.join(bare, 'etc'))
        with open(os.path.join(bare, 'etc/passwd'), 'w') as file:
            file.write('msbare:x:%d:%d::/home/msbare:/bin/bash\n' % pwd.getpwnam('msbare')[2:4])
        sh('mknod', '-m', '666', os.path.join(bare, 'dev/null'), 'c', '1', '3')

    def copy_with_libraries(self, program, bare):
        shutil.copy(program, os.path.join(bare, 'bin'))
        for library in re.findall(r'(/\S+) \(0x', sh('ldd', program)):
            place = bare + os.path.dirname(library)
            os.makedirs(place, exist_ok=True)
            shutil.copy(library, place)

    def make_keys(self):
        for name, phrase in (('host_key', ''), ('key', ''), ('other_key', ''),
                             ('locked_key', 'open sesame')):
            sh('ssh-keygen', '-q', '-t', 'ed25519', '-N', phrase, '-f', os.path.join(self.root, name))
        self.write('authorized_keys', self.read('key.pub') + self.read('locked_key.pub'))
        self.write('known_hosts', '[127.0.0.*]:* ' + self.read('host_key.pub'))
        self.write('wrong_hosts', '[127.0.0.*]:* ' + self.read('other_key.pub'))

    def sshd(self, prepare='', settings=''):
        """Start one more sshd, with `settings` before its own; with `prepare`, after that shell line in a mount
        namespace of its own."""
        self.sshds.append(Sshd(self, prepare, settings))
        return self.sshds[-1]

    def path(self, *names):
        return os.path.join(self.root, *names)

    def read(self, name):
        with open(self.path(name), errors='replace') as file:
            return file.read()

    def write(self, name, text):
        with open(self.path(name), 'w') as file:
            file.write(text)

    def variables(self):
        """What every host of every inventory has, so that no setting of this machine's user matters."""
        return {
            'ansible_host': '127.0.0.1', 'ansible_port': self.port, 'ansible_user': self.login,
            'ansible_ssh_private_key_file': self.path('key'),
            'ansible_ssh_common_args': self.ssh_options('known_hosts'),
            'ansible_python_interpreter': '/usr/bin/python3',
        }

    def ssh_options(self, known_hosts):
        return ('-F /dev/null -o IdentitiesOnly=yes -o GlobalKnownHostsFile=/dev/null '
                '-o UserKnownHostsFile=' + self.path(known_hosts))

    def uids(self):
        return {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gecos.startswith(MARK)}


class Sshd:
    """One sshd in a process group of its own, so that it can be stopped with all its sessions."""

    def __init__(self, lab, prepare, settings=''):
        self.lab = lab
        self.prepare = prepare
        self.port = free_port()
        self.config = lab.path('sshd_config.%d' % self.port)
        self.process = None
        fields = {'root': lab.root, 'bare': BARE_ROOT, 'port': self.port,
                  'passwords': 'yes' if ROOT else 'no'}
        lab.write(os.path.basename(self.config), settings + (SSHD_CONFIG + SSHD_MATCHES * ROOT) % fields)
        self.start()

    def start(self):
        # sshd insists on an absolute path of itself, and as root on its separation directory.
        program = shutil.which('sshd', path=os.environ.get('PATH', '') + ':/usr/sbin:/usr/local/sbin')
        if not program:
            raise RuntimeError('no sshd on this machine')
        if ROOT:
            os.makedirs('/run/sshd', mode=0o755, exist_ok=True)
        argv = [program, '-f', self.config, '-D', '-e']
        if self.prepare:
            line = 'mount --make-rprivate / && %s; exec %s' % (self.prepare, ' '.join(argv))
            argv = ['unshare', '-m', 'sh', '-c', line]
        with open(self.lab.path('sshd.log'), 'ab') as log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: port_answers(self.port), 10, 'sshd does not listen')

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()


class Docker:
    """A dockerd in a directory of its own, with a container that only sleeps."""

    NAME = 'ms1'

    def __init__(self, lab):
        self.place = lab.path('docker')
        os.makedirs(self.place)
        self.socket = 'unix://%s/socket' % self.place
        argv = ['dockerd', '--iptables=false', '--ip6tables=false', '--bridge=none', '--storage-driver=vfs',
                '--data-root', self.place + '/data', '--exec-root', self.place + '/exec', '-H', self.socket,
                '-p', self.place + '/pid']
        with open(self.place + '/log', 'ab') as log:
            self.process = subprocess.Popen(['setpriv', '--pdeathsig', 'TERM'] + argv, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: os.path.exists(self.place + '/socket'), 20, 'dockerd does not listen')
        sh('tar', '-C', lab.tree(), '-cf', self.place + '/tree.tar', '.')
        self.run('import', self.place + '/tree.tar', 'tree')
        self.run('run', '-d', '--init', '--name', self.NAME, '--network', 'none', 'tree', 'sleep', 'infinity')
        self.pid = int(self.run('inspect', '-f', '{{.State.Pid}}', self.NAME))

    def run(self, *argv):
        return sh('docker', '-H', self.socket, *argv)

    def processes(self):
        """The command lines in the container, but for its init and the sleep."""
        mine = os.readlink('/proc/%d/ns/pid' % self.pid)
        pids = [pid for pid in all_pids() if os.path.exists('/proc/%d/ns/pid' % pid)
                and os.readlink('/proc/%d/ns/pid' % pid) == mine and not is_zombie(pid)]
        lines = [proc(pid, 'cmdline').replace('\0', ' ') for pid in pids if pid != self.pid]
        return [line for line in lines if not line.startswith('sleep infinity')]

    def stop(self):
        self.run('rm', '-f', self.NAME)
        self.process.terminate()
        self.process.wait()


# What Ansible and its tests use of a Debian, and what that depends on: its files copied in half a second, where
# debootstrap takes half a minute.

TREE_PACKAGES = 'bash dash coreutils grep sed tar hostname util-linux login sudo'
TREE_SETTINGS = ('passwd group shadow login.defs nsswitch.conf environment os-release ld.so.cache pam.d security '
                 'sudoers sudoers.d')


def make_tree(tree):
    python = os.path.basename(os.path.realpath('/usr/bin/python3'))
    packages = with_dependencies(TREE_PACKAGES.split() + [python + '-minimal', 'lib%s-stdlib' % python])
    names = ['/usr/bin/python3', '/usr/bin/sh'] + ['/' + name for name in ('bin', 'sbin', 'lib', 'lib64')]
    for name in sh('dpkg', '-L', *packages).splitlines():
        name = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if os.path.lexists(name) and (os.path.islink(name) or not os.path.isdir(name)):
            names.append(name)
    for name in ('tmp', 'var/tmp', 'root', 'run', 'dev', 'proc', 'sys', 'etc') + tuple(
            'home/' + name for name in ACCOUNTS):
        os.makedirs(os.path.join(tree, name))
    for name in ACCOUNTS:
        shutil.chown(os.path.join(tree, 'home', name), name)
    for name in ('tmp', 'var/tmp'):
        os.chmod(os.path.join(tree, name), 0o1777)
    for number, name in enumerate(('null', 'zero', 'random', 'urandom')):
        sh('mknod', '-m', '666', os.path.join(tree, 'dev', name), 'c', '1', '3589'[number])
    sh('cp', '-a', *['/etc/' + name for name in TREE_SETTINGS.split()], os.path.join(tree, 'etc'))
    names = [name[1:] for name in set(names) if not name.startswith(('/usr/share/', '/etc/'))]
    sh('tar', '-C', '/', '-cf', tree + '.tar', '-T', '-', input='\n'.join(names).encode())
    sh('tar', '-C', tree, '-xf', tree + '.tar')


def with_dependencies(packages):
    lines = sh('dpkg-query', '-W', '-f', '${Package} ${Pre-Depends}, ${Depends}\n').splitlines()
    needs = {line.split()[0]: re.findall(r'[, |] *([a-z0-9][a-z0-9.+-]+)(?=[ :,|]|$)', line) for line in lines}
    found = set()
    while packages:
        name = packages.pop()
        if name in needs and name not in found and name != 'debconf':       # which needs a Perl
            found.add(name)
            packages += needs[name]
    return sorted(found)


BASE_PACKAGES = {'sshd': 'openssh-server', 'ssh': 'openssh-client', 'sudo': 'sudo', 'rsync': 'rsync',
                 'setfacl': 'acl', 'awk': 'mawk', 'unzip': 'unzip', 'doas': 'opendoas', 'tcsh': 'tcsh', 'fish': 'fish'}


def install_packages(wanted):
    """Install what is lacking: on Debian, as root.  Elsewhere the user must."""
    path = os.environ.get('PATH', '') + ':/usr/sbin'
    lacking = [package for program, package in wanted.items() if not shutil.which(program, path=path)]
    if not (lacking and ROOT and shutil.which('apt-get')):
        return
    note('installing %s' % ' '.join(lacking))
    quiet = dict(os.environ, DEBIAN_FRONTEND='noninteractive', RUNLEVEL='1')    # which starts no service
    sh('apt-get', 'update', '-q', env=quiet)
    sh('apt-get', 'install', '-q', '-y', '--no-install-recommends', *lacking, env=quiet)


def remove_accounts():
    """Those of ACCOUNTS, and those that a test added."""
    accounts = pwd.getpwall()
    for entry in accounts:
        if entry.pw_name in ACCOUNTS and not entry.pw_gecos.startswith(MARK):
            raise RuntimeError('account %s exists and is not ours' % entry.pw_name)
    for entry in accounts:
        if entry.pw_gecos.startswith(MARK):
            for pid in [pid for pid in all_pids() if uid_of(pid) == entry.pw_uid]:
                kill(pid)
            subprocess.run(['userdel', '-f', '-r', entry.pw_name], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
            shutil.rmtree(entry.pw_dir, ignore_errors=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def port_answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) == 0


def wait_for(condition, seconds, complaint):
    deadline = time.time() + seconds
    while time.time() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise RuntimeError(complaint)


# /proc, because ps is not everywhere and cannot show the environment of others.

def all_pids():
    return [int(name) for name in os.listdir('/proc') if name.isdigit()]


def proc(pid, name):
    """A file of /proc as text; '' when the process is gone or not ours to read."""
    try:
        with open('/proc/%d/%s' % (pid, name), 'rb') as file:
            return file.read().decode('utf-8', 'replace')
    except OSError:
        return ''


def status_of(pid):
    return dict(line.split(':\t', 1) for line in proc(pid, 'status').splitlines() if ':\t' in line)


def uid_of(pid):
    uid = status_of(pid).get('Uid', '')
    return int(uid.split()[0]) if uid else None


def parent_of(pid):
    return int(status_of(pid).get('PPid', 0))


def is_zombie(pid):
    return status_of(pid).get('State', 'Z').startswith('Z')


def kill(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except OSError:
        pass


LAB = Lab()


# 4 PLAY #########################################################################################
# One ansible command in a directory of its own: home, temporary directory, control sockets.  All
# its processes carry MS_RUN in their environment; those on the target have an account of the lab,
# or SUDO_USER, or the port of our sshd in SSH_CONNECTION.

class Engine:
    """stock, plugin or mitogen: the settings that make Ansible run tasks that way."""

    def __init__(self, name, core=NEWEST):
        self.name = name
        self.core = core
        self.venv = venv(core)

    def environment(self):
        if self.name == 'plugin':
            return {'ANSIBLE_STRATEGY_PLUGINS': HERE, 'ANSIBLE_STRATEGY': 'mitogen_single'}
        if self.name == 'mitogen':
            return {'ANSIBLE_STRATEGY_PLUGINS': os.path.join(mitogen(), 'ansible_mitogen', 'plugins', 'strategy'),
                    'ANSIBLE_STRATEGY': 'mitogen_linear', 'PYTHONPATH': mitogen()}
        return {}


class Play:
    """One run of an ansible command, from its files to what it left behind."""

    def __init__(self, engine, files=None, hosts=None, env=None, args=(), program='ansible-playbook',
                 stdin='', timeout=PLAY_SECONDS, home=None):
        LAB.plays += 1
        self.engine = engine
        self.mark = '%d.%d' % (os.getpid(), LAB.plays)
        self.dir = LAB.path('%04d' % LAB.plays)         # the same length for all: paths get into sizes
        self.timeout = timeout
        self.stdin = stdin
        self.home = home or os.path.join(self.dir, 'home')
        self.tmp = os.path.join(self.dir, 't')
        self.sockets = os.path.join(self.dir, 'cp')
        for folder in (self.dir, self.tmp, self.sockets, self.home):
            os.makedirs(folder, exist_ok=True)
        self.write_files(dict(files or {}, **{'plugins/callback/msrecord.py': RECORDER}))
        self.write_files({'inventory.json': inventory(hosts)})
        self.argv = [os.path.join(engine.venv, 'bin', program), '-i', 'inventory.json', *args]
        self.env = self.environment(env or {})
        self.process = None
        self.rc = self.out = self.err = self.seconds = self.usage = None

    def write_files(self, files):
        for name, content in files.items():
            path = os.path.join(self.dir, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if isinstance(content, str):
                content = textwrap.dedent(content).lstrip('\n').encode()
            with open(path, 'wb') as file:
                file.write(content)
            os.chmod(path, 0o755 if content[:2] == b'#!' else 0o644)

    def environment(self, extra):
        env = {
            'PATH': '%s/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' % self.engine.venv,
            'HOME': self.home, 'TMPDIR': self.tmp, 'LANG': 'C.UTF-8', 'MS_RUN': self.mark,
            'ANSIBLE_HOME': os.path.join(self.home, '.ansible'),
            'ANSIBLE_SSH_CONTROL_PATH_DIR': self.sockets,
            'ANSIBLE_NOCOLOR': '1', 'ANSIBLE_LOCALHOST_WARNING': 'false',
            'ANSIBLE_RETRY_FILES_ENABLED': '0', 'ANSIBLE_TIMEOUT': '20',
            'ANSIBLE_COLLECTIONS_PATH': ':'.join(
                [os.path.join(self.dir, 'collections'), os.path.join(CACHE, 'collections')]),
            'ANSIBLE_CALLBACK_PLUGINS': os.path.join(self.dir, 'plugins', 'callback'),
            'ANSIBLE_CALLBACKS_ENABLED': 'msrecord',
            'MS_RECORD': os.path.join(self.dir, 'record.jsonl'),
        }
        env.update(self.engine.environment())
        env.update(extra)
        return {name: value for name, value in env.items() if value is not None}

    def start(self):
        logs = ['sshd.log'] + ['sudo.log'] * ROOT
        self.logged = {name: len(LAB.read(name)) for name in logs}
        self.began = time.time()
        self.out_file = open(os.path.join(self.dir, 'out'), 'w+b')
        self.err_file = open(os.path.join(self.dir, 'err'), 'w+b')
        self.process = subprocess.Popen(
            self.argv, cwd=self.dir, env=self.env, stdin=subprocess.PIPE, stdout=self.out_file,
            stderr=self.err_file, start_new_session=True)
        try:
            self.process.stdin.write(self.stdin.encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        return self

    def finish(self):
        """Wait for the end, read everything; a play that does not end is killed and reported."""
        deadline = self.began + self.timeout
        pid = 0
        while not pid and time.time() < deadline:
            pid, status, self.usage = os.wait4(self.process.pid, os.WNOHANG)
            time.sleep(0 if pid else 0.005)
        if not pid:
            os.killpg(self.process.pid, signal.SIGKILL)
            pid, status, self.usage = os.wait4(self.process.pid, 0)
        self.process.returncode = self.rc = os.waitstatus_to_exitcode(status)
        self.hung = time.time() >= deadline
        self.seconds = time.time() - self.began
        self.out, self.err = (self.slurp(file) for file in (self.out_file, self.err_file))
        self.close_masters()
        return self

    def slurp(self, file):
        with file:
            file.seek(0)
            return file.read().decode('utf-8', 'replace')

    def running(self):
        """Without taking the exit status away from `finish`."""
        return not is_zombie(self.process.pid)

    def run(self):
        return self.start().finish()

    def close_masters(self):
        """Ask every ControlPersist master of this run to leave, as if its time had come."""
        for path in os.listdir(self.sockets):
            path = os.path.join(self.sockets, path)
            subprocess.run(['ssh', '-F', '/dev/null', '-O', 'exit', '-S', path, 'x'],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    # What the servers saw.

    def new_log(self, name):
        return LAB.read(name)[self.logged[name]:] if name in self.logged else ''

    def logins(self):
        """{account: number of ssh connections}"""
        return collections.Counter(re.findall(r'^Accepted \w+ for (\w+) from',
                                              self.new_log('sshd.log'), re.M))

    def sessions(self):
        """{account: number of commands started over those connections}"""
        return collections.Counter(re.findall(
            r'^Starting session: \w+.*? for (\w+) from', self.new_log('sshd.log'), re.M))

    def sudos(self):
        """{target account: number of sudo commands}"""
        return collections.Counter(re.findall(r' ; USER=(\w+) ; ', self.new_log('sudo.log')))

    # What Ansible reported.

    def events(self):
        try:
            with open(self.env['MS_RECORD']) as file:
                return [json.loads(line) for line in file]
        except FileNotFoundError:
            return []

    def results(self, task, host=None):
        """The results of the tasks of that name, in order."""
        return [event['result'] for event in self.events() if event['task'] == task
                and event['event'].startswith('runner_') and event['event'] != 'runner_start'
                and host in (None, event['host'])]

    def result(self, task, host=None):
        found = self.results(task, host)
        if not found:
            raise AssertionError('no result of %r\n%s' % (task, self.tail()))
        return found[-1]

    def status(self, task, host=None):
        """'ok', 'failed', 'skipped' or 'unreachable'"""
        found = [event['event'] for event in self.events() if event['task'] == task
                 and event['event'].startswith('runner_') and event['event'] != 'runner_start'
                 and host in (None, event['host'])]
        return found[-1][len('runner_'):] if found else None

    def tail(self):
        return '%s, exit %s, %s\n%s\n%s' % (
            self.engine.name, self.rc, self.dir, (self.out or '')[-4000:], (self.err or '')[-3000:])

    # What it left.

    def processes(self):
        """Processes of this run, on either side."""
        lab_uids = LAB.uids()
        ports = '|'.join(str(sshd.port) for sshd in LAB.sshds)
        sign = re.compile(r'(^|\0)(MS_RUN=%s|SUDO_USER=(%s)|SSH_CONNECTION=[^\0]* (%s))\0' % (
            re.escape(self.mark), '|'.join(ACCOUNTS), ports))
        return [pid for pid in all_pids()
                if (uid_of(pid) in lab_uids or sign.search(proc(pid, 'environ')))
                and not is_zombie(pid)]

    def memory(self):
        """Bytes that the processes of this run take on the controller; what several share counts once."""
        sign, total = '\0MS_RUN=%s\0' % self.mark, 0
        for pid in all_pids():      # a master of ssh's writes its title over its environment
            if sign in '\0' + proc(pid, 'environ') or self.sockets in proc(pid, 'cmdline'):
                total += sum(int(size) << 10 for size in re.findall(r'^Pss: +(\d+)', proc(pid, 'smaps_rollup'), re.M))
        return total

    def leftovers(self):
        """A line for each process and each temporary file that should be gone."""
        lines = ['process %d: %s' % (pid, proc(pid, 'cmdline').replace('\0', ' ')[:200])
                 for pid in self.processes()]
        places = [self.tmp, os.path.join(self.home, '.ansible', 'tmp')]
        lines += ['file %s' % path for place in places for path in glob.glob(place + '/*')]
        uids = LAB.uids()
        for path in glob.glob('/tmp/*') + glob.glob('/var/tmp/*') + glob.glob('/dev/shm/*') + \
                glob.glob('/home/ms*/.ansible/tmp/*') + glob.glob('/tmp/.[a-z]*'):
            if os.path.lexists(path) and os.lstat(path).st_uid in uids:
                lines.append('file %s' % path)
        return lines

    def left_behind(self, seconds=LEFTOVER_SECONDS):
        """What is still there after the time that the promise allows."""
        deadline = time.time() + seconds
        while True:
            lines = self.leftovers()
            if not lines or time.time() > deadline:
                return lines
            time.sleep(0.1)

    def sweep(self):
        """Remove whatever a play left, so that it cannot disturb the next one."""
        for pid in self.processes():
            kill(pid)
        for line in self.leftovers():
            if line.startswith('file '):
                shutil.rmtree(line[5:], ignore_errors=True)
                if os.path.lexists(line[5:]) and not os.path.isdir(line[5:]):
                    os.unlink(line[5:])

    def clean(self):
        self.sweep()
        shutil.rmtree(self.dir, ignore_errors=True)


def inventory(hosts):
    """JSON that Ansible's yaml inventory plugin reads: {name: variables}; text is taken as it is.

    Every host has the variables of the lab; a value of None removes one."""
    if isinstance(hosts, str):
        return hosts
    hosts = {'t1': {}} if hosts is None else hosts
    full = {name: dict(LAB.variables(), **own) for name, own in hosts.items()}
    return json.dumps({'all': {'hosts': {
        name: {key: value for key, value in own.items() if value is not None}
        for name, own in full.items()}}})


def many_hosts(count):
    return {'t%d' % n: {'ansible_host': '127.0.0.%d' % n} for n in range(1, count + 1)}


# 5 RECORD #######################################################################################
# A callback plugin of ours writes one JSON line per event.  Two runs never agree on times, process
# numbers and temporary names: `normal` replaces exactly those, and nothing else.

RECORDER = r'''
DOCUMENTATION = """
    name: msrecord
    type: notification
    short_description: one JSON line per event
    description: for the tests of mitogen_single
"""
import json, os, time
from ansible.plugins.callback import CallbackBase

class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = 'notification'
    CALLBACK_NAME = 'msrecord'
    CALLBACK_NEEDS_ENABLED = True

    def put(self, event, host=None, task=None, result=None):
        line = dict(event=event, host=host, task=task, result=result, at=time.time())
        with open(os.environ['MS_RECORD'], 'a') as file:
            file.write(json.dumps(line, default=repr, sort_keys=True) + '\n')

    def put_result(self, event, result):
        self.put(event, result._host.get_name(), result._task.get_name(), dict(result._result))

    def v2_playbook_on_play_start(self, play):
        self.put('play_start', task=play.get_name())
    def v2_playbook_on_task_start(self, task, is_conditional):
        self.put('task_start', task=task.get_name())
    def v2_playbook_on_handler_task_start(self, task):
        self.put('handler_start', task=task.get_name())
    def v2_playbook_on_cleanup_task_start(self, task):
        self.put('cleanup_start', task=task.get_name())
    def v2_playbook_on_no_hosts_matched(self):
        self.put('no_hosts_matched')
    def v2_playbook_on_no_hosts_remaining(self):
        self.put('no_hosts_remaining')
    def v2_playbook_on_notify(self, handler, host):
        self.put('notify', host.get_name(), handler.get_name())
    def v2_playbook_on_include(self, included_file):
        self.put('include', task=os.path.basename(str(included_file._filename)))
    def v2_runner_on_start(self, host, task):
        self.put('runner_start', host.get_name(), task.get_name())
    def v2_runner_on_ok(self, result):
        self.put_result('runner_ok', result)
    def v2_runner_on_failed(self, result, ignore_errors=False):
        self.put_result('runner_failed', result)
    def v2_runner_on_skipped(self, result):
        self.put_result('runner_skipped', result)
    def v2_runner_on_unreachable(self, result):
        self.put_result('runner_unreachable', result)
    def v2_runner_item_on_ok(self, result):
        self.put_result('item_ok', result)
    def v2_runner_item_on_failed(self, result):
        self.put_result('item_failed', result)
    def v2_runner_item_on_skipped(self, result):
        self.put_result('item_skipped', result)
    def v2_runner_retry(self, result):
        self.put_result('retry', result)
    def v2_runner_on_async_ok(self, result):
        self.put_result('async_ok', result)
    def v2_runner_on_async_failed(self, result):
        self.put_result('async_failed', result)
    def v2_on_file_diff(self, result):
        self.put_result('diff', result)
    def v2_playbook_on_stats(self, stats):
        for host in sorted(stats.processed):
            self.put('stats', host, result=stats.summarize(host))
'''

VOLATILE = set('''
    start end delta atime ctime mtime inode dev uuid ansible_job_id results_file elapsed pid
    date_time ansible_date_time ansible_uptime_seconds ansible_loadavg ansible_memfree_mb
    ansible_memory_mb ansible_mounts ansible_swapfree_mb ansible_entropy
    SSH_CLIENT SSH_CONNECTION SSH_TTY TERM SHLVL SUDO_COMMAND _ OLDPWD
    block_available block_used inode_available inode_used size_available ansible_device_links
'''.split())

UNORDERED = {'ansible_interfaces', 'ansible_virtualization_tech_guest',
             'ansible_virtualization_tech_host'}

BACKUP = r'\.\d+\.\d{4}-\d\d-\d\d@\d\d:\d\d:\d\d~'
SCRUBS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r'Shared connection to \S+ closed\.(\r?\n)?', ''),
    (r'ansible-tmp-[\d.]+-\d+-\d+', 'ansible-tmp-N'),
    (r'/(root|home/\w+)/\.ansible/tmp/ansible-tmp-N', '/tmp/N'),      # of the account that reads it, or logs in
    (r'ansible-local-\w+(/[\w.]+)?', 'ansible-local-N'),
    (r'/tmp/(ansible[\w.-]*_|\.?ansible\.|tmp)[\w-]+', '/tmp/N'),
    (r'(/tmp|/var/tmp)/ansible[^/\s\'"]*', '/tmp/N'),
    (r'^(\.|tmp)[a-z0-9_]{8}$', 'N'),               # _original_basename of a copy with content
    (BACKUP, '.BACKUP~'),
    (r'j?\d{6,}\.\d+', 'JOB'),
    (r'\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:?\d\d)?', 'TIME'),
    (r'0x[0-9a-f]{8,}', '0xN'),
    (r'\r\n', '\n'),
)]


def normal(value, play):
    """`value` without what differs between any two runs."""
    if isinstance(value, dict):
        # `version` is random where it stands beside an inode, and means something elsewhere.
        volatile = VOLATILE | {'version'} if 'inode' in value else VOLATILE
        return {key: normal(sorted(item) if key in UNORDERED else item, play)
                for key, item in value.items() if key not in volatile}
    if isinstance(value, list):                 # a line of which nothing remains was ssh's, not the command's
        both = [(item, normal(item, play)) for item in value]
        return [new for old, new in both if new != '' or old == '']
    if isinstance(value, str):
        value = value.replace(play.dir, 'PLAY')
        for pattern, replacement in SCRUBS:
            value = pattern.sub(replacement, value)
    return value


def story(play, without=()):
    """What a play reported, in a form that two correct runs share: hosts race, so one list each."""
    told = collections.defaultdict(list)
    for event in play.events():
        result = event['result']
        if isinstance(result, dict):
            result = {key: value for key, value in result.items() if key not in without}
        line = (event['event'], event['task'], normal(result, play))
        told[event['host'] or 'all'].append(line)
    return dict(told)


def differences(expected, got, path=''):
    """Lines that name each leaf in which two stories differ."""
    if isinstance(expected, dict) and isinstance(got, dict):
        return [line for key in sorted(set(expected) | set(got), key=str)
                for line in differences(expected.get(key, 'ABSENT'),
                                        got.get(key, 'ABSENT'), '%s.%s' % (path, key))]
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        if len(expected) == len(got):
            return [line for n, pair in enumerate(zip(expected, got))
                    for line in differences(*pair, path='%s[%s]' % (path, label(pair[0], n)))]
        pair = [[str(item)[:300] for item in side] for side in (expected, got)]
        return list(difflib.unified_diff(*pair, 'stock' + path, 'plugin' + path, lineterm='', n=1))
    if expected == got:
        return []
    return ['%s\n    stock:  %.1500r\n    plugin: %.1500r' % (path, expected, got)]


def label(item, number):
    """An event by its kind and task, anything else by its number."""
    is_event = isinstance(item, tuple) and len(item) == 3
    return '%s %s' % item[:2] if is_event else number


def snapshot(folder):
    """{path: (mode, owner, content)} of a tree on the target."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = os.path.join(place, name)
            found[backup_free(os.path.relpath(path, folder))] = entry(path)
    return found


def entry(path):
    """None where nothing is."""
    if not os.path.lexists(path):
        return None
    info = os.lstat(path)
    return oct(info.st_mode), info.st_uid, info.st_gid, content_of(path, info)


def backup_free(path):
    return re.sub(BACKUP, '.BACKUP~', path)


def content_of(path, info):
    if stat.S_ISLNK(info.st_mode):
        return os.readlink(path)
    if stat.S_ISREG(info.st_mode):
        with open(path, 'rb') as file:
            return hashlib.sha256(file.read()).hexdigest()
    return None


# 6 COMPARE ######################################################################################

TEXTS = ('msg', 'module_stderr', 'module_stdout', 'exception', 'stdout', 'stderr', 'stdout_lines',
         'stderr_lines', 'rc')


def newest(test):
    """For tests of what no ansible-core does differently: the matrix leaves them out."""
    test.newest_only = True
    return test


class Real(unittest.TestCase):
    """Base of all tests that run Ansible.  `core` is the ansible-core, `every_core` joins the matrix.

    `pipelining` is whether stock Ansible runs with it where a test does not say: it runs twice as
    fast then, but shows less of what it does by itself.
    """

    core = NEWEST
    every_core = False
    pipelining = False
    maxDiff = 20000

    @classmethod
    def setUpClass(cls):
        if cls is Real:
            raise unittest.SkipTest('base class')
        LAB.up()
        if not os.path.exists(PLUGIN) and ENGINE == 'plugin':
            raise unittest.SkipTest('no plugin: mitogen_single.py is not here')
        cls.stock = Engine('stock', cls.core)
        cls.plugin = Engine(ENGINE, cls.core)
        cls.ours = ENGINE == 'plugin'

    def setUp(self):
        self.plays = []
        self.out = '/home/mslab/out' if ROOT else os.path.join(LAB.path('out'))

    def tearDown(self):
        for play in self.plays:
            play.clean()
        shutil.rmtree(self.out, ignore_errors=True)

    def needs_root(self):
        if not ROOT:
            self.skipTest(without_root())

    def needs_slow(self, why):
        if not os.environ.get('MITOGEN_SINGLE_TEST_SLOW'):
            self.skipTest('slow: %s, needs --slow' % why)

    def needs_plugin(self, why='this is a promise of the plugin alone'):
        if not self.ours:
            self.skipTest('engine is stock: %s' % why)

    def needs_core(self, version):
        if by_version([self.core, version])[0] != version:
            self.skipTest('not on this ansible-core: needs %s' % version)

    def new(self, engine, book, **options):
        """A play that is not started yet.  `book` is the text of play.yml."""
        files = dict(options.pop('files', {}))
        options['args'] = tuple(options.get('args', ()))
        if book is not None:
            files['play.yml'] = book
            options['args'] += ('play.yml',)
        play = Play(engine, files=files, **options)
        self.plays.append(play)
        return play

    def run_ours(self, book, leftovers=True, **options):
        """Run by the plugin alone; it must end and leave nothing."""
        play = self.new(self.plugin, book, **options).run()
        self.assertFalse(play.hung, 'hangs: ' + play.tail())
        if leftovers and self.ours:
            self.assertEqual(play.left_behind(), [], play.tail())
        return play

    def is_pipelined(self):
        return self.pipelining or self.core != NEWEST

    def compare(self, book, rc=0, without=(), leftovers=True, logins=None, sudos=None, files=None,
                pipelining=None, between=None, **options):
        """Run by stock, then by the plugin; everything that Ansible and the target can tell is equal.

        Stock Ansible runs with pipelining where `pipelining` or the class says so, and on older
        ansible-cores, which have less time.  `rc` is the exit code that the test means to see,
        `without` are keys of results not to compare, `logins` and `sudos` what the plugin may use:
        {account: count}, `between` what to clean up on the target between the two runs, where that
        is not self.out.
        """
        options['files'] = files or {}
        if self.is_pipelined() if pipelining is None else pipelining:
            options['env'] = dict(options.get('env') or {}, ANSIBLE_PIPELINING='1')
        shutil.rmtree(self.out, ignore_errors=True)
        fresh_homes()
        stock = self.new(self.stock, book, **options).run()
        stock_files = snapshot(self.out)
        shutil.rmtree(self.out, ignore_errors=True)
        self.assertEqual(stock.rc, rc, 'the test is wrong, stock says:\n' + stock.tail())
        self.remove_control(stock)
        stock.sweep()
        fresh_homes()
        if between:
            between()
        ours = self.run_ours(book, leftovers=leftovers, **options)
        self.assert_same(stock, ours, without)
        self.assertEqual(stock_files, snapshot(self.out), 'files on the target')
        self.assert_counts(ours, logins, sudos)
        return stock, ours

    def compare_failure(self, book, status, message, task=None, ignore=TEXTS, **options):
        """Both fail alike in everything but wording, and the plugin's message matches `message`.

        `status` is 'failed', 'unreachable' or None for whichever stock says; `task` names one task,
        else the first one that did not pass is meant.
        """
        if self.is_pipelined():
            options['env'] = dict(options.get('env') or {}, ANSIBLE_PIPELINING='1')
        stock = self.new(self.stock, book, **options).run()
        self.assertNotEqual(stock.rc, 0, 'the test is wrong, stock passes:\n' + stock.tail())
        self.remove_control(stock)
        shutil.rmtree(self.out, ignore_errors=True)
        ours = self.run_ours(book, **options)
        self.assert_same(stock, ours, without=ignore)
        bad = [event for event in ours.events() if event['event'] in ('runner_failed', 'runner_unreachable')
               and task in (None, event['task'])][0]
        if status:
            self.assertEqual(bad['event'], 'runner_' + status)
        said = ' '.join(str(bad['result'].get(key, '')) for key in TEXTS)
        self.assertRegex(said, message)
        return stock, ours

    def remove_control(self, play):
        wait = time.time() + 5
        while play.processes() and time.time() < wait:
            time.sleep(0.05)
        for pid in play.processes():
            kill(pid)

    def assert_same(self, stock, ours, without=()):
        expected, got = story(stock, without), story(ours, without)
        if expected != got:
            self.fail('\n'.join(differences(expected, got)[:40]) + '\n' + ours.tail())
        self.assertEqual(stock.rc, ours.rc, ours.tail())

    def assert_counts(self, ours, logins, sudos):
        if self.ours and logins is not None:
            self.assertEqual(dict(ours.logins()), logins, 'ssh connections')
            self.assertEqual(dict(ours.sessions()), logins, 'commands over ssh')
        if self.ours and sudos is not None:
            self.assertEqual(dict(ours.sudos()), sudos, 'sudo commands')


def fresh_homes():
    """Modules warn when they make ~/.ansible/tmp: both runs shall have to."""
    for path in glob.glob('/home/ms*/.ansible') if ROOT else ():
        shutil.rmtree(path)


# 7 TEXT #########################################################################################
# The invariants that keep the file readable, and fit to be sent.

FENCE = '# ======== everything below this line is sent to targets'
LAST_FENCE = '# ======== everything below this line is sent by itself'
BANNER = re.compile(r'^# (\d+) ([A-Z][A-Z ]*?) #{20,}$', re.M)
MAP_LINE = re.compile(r'^ +(\d+) +([A-Z]+(?: [A-Z]+)*)  +\S', re.M)
ANSIBLE_FREE = ('CLIENT', 'BROKER', 'HOPS', 'SHIPPING', 'WIRE', 'LOOP', 'ROUTER', 'CHILDREN',
                'IMPORTER', 'FILES', 'RUNNER', 'MAIN')


# What README.rst says under Security, clause by clause, and the tests that would fail if it were not so.
PROMISES = {
    'An agent has the rights of its account, and leaves nothing there but an empty ``~/.ansible/tmp`` and files of jobs.':
        'RealModules.test_surroundings RealWorld.test_same_results_one_connection_one_sudo_per_account',
    'Nothing that a target sends is unpickled, evaluated or used as a path on the controller, and an answer counts only '
    'for what its agent was asked;': 'PipeGarbage.test_a_hostile_target_harms_nobody_else',
    'a host on the way speaks for those behind it.': 'PipeGarbage.test_a_hostile_target_harms_nobody_else',
    'Passwords go to the terminal or pipe that asks for them, nowhere else.':
        'RealSsh.test_password_is_nowhere',
    'The broker listens nowhere: workers inherit their sockets.': 'RealLeftovers.test_has_no_door',
    'However ansible-playbook ends, the broker sees it within a second;':
        'RealLeftovers.test_killed RealLeftovers.test_terminated RealLeftovers.test_ctrl_c_at_any_moment',
    'agents end with their connection.': 'RealFailures.test_ssh_killed RealFailures.test_broker_killed',
    "A module's files are kept as paths and hashes in ``~/.ansible/mitogen_single_cache``, private and checked.":
        'RealCache.test_is_used_while_it_is_private RealCache.test_broken_entries_are_replaced RealCache.test_is_never_stale',
    '``git log`` names whom to tell of a hole, in private.': ''}


def shortened(core):
    """As the plugin does it before the core travels; the tests see to it that it changes nothing."""
    core = re.sub(r'(?m)(^ *|  )#.*$', '', core)
    core = re.sub(r'(?m)^ +', lambda found: ' ' * (len(found.group()) // 4), core)
    return re.sub(r"('[^'\n]*')|(?<=\S) ?([=,:%+*/<>!|&-]+) (?=\S)", lambda found: found[1] or found[2], core)


def names_given(statement):
    if isinstance(statement, ast.Assign):
        return [node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return [statement.name] if isinstance(statement, (ast.ClassDef, ast.FunctionDef)) else []


class Text(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        if not os.path.exists(PLUGIN):
            raise unittest.SkipTest('no plugin: mitogen_single.py is not here')
        with open(PLUGIN, encoding='utf-8') as file:
            cls.text = file.read()
        cls.doc = ast.get_docstring(ast.parse(cls.text), clean=False)

    def core(self):
        """What is sent, comments included; lines keep their numbers."""
        return self.between(FENCE, LAST_FENCE)

    def job(self):
        return self.between(LAST_FENCE, 'if __name__ == ')

    def between(self, *fences):
        lines = self.text.splitlines(True)
        first, last = [[n for n, line in enumerate(lines) if line.startswith(fence)] for fence in fences]
        self.assertEqual((len(first), len(last)), (1, 1), fences)
        return '\n' * first[0] + ''.join(lines[first[0]:last[0]])

    def sections(self):
        """{NOUN: text of the section}"""
        parts = BANNER.split(self.text)
        return dict(zip(parts[2::3], parts[3::3]))

    def test_ansible_doc_can_read_every_assignment(self):
        """It warns of one that has not just a name on its left side."""
        for node in ast.parse(self.text).body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                self.assertIsInstance(target, ast.Name, ast.unparse(node))

    def test_banners_are_consecutive(self):
        numbers = [int(number) for number, noun in BANNER.findall(self.text)]
        first = numbers[0] if numbers else None
        self.assertIn(first, (0, 1))
        self.assertEqual(numbers, list(range(first, first + len(numbers))))

    def test_banners_are_the_map(self):
        banners = dict(BANNER.findall(self.text))
        told = {number: noun for number, noun in MAP_LINE.findall(self.doc) if number != '0'}
        banners.pop('0', None)
        self.assertEqual(banners, told)

    def test_own_banners_are_the_map(self):
        with open(os.path.abspath(__file__), encoding='utf-8') as file:
            text = file.read()
        own_map = MAP_LINE.findall(ast.get_docstring(ast.parse(text), clean=False))
        self.assertEqual(BANNER.findall(text), own_map)

    def test_lines_are_short(self):
        long = [n for n, line in enumerate(self.text.splitlines(), 1) if len(line) > 120]
        self.assertEqual(long, [])

    def test_core_is_ascii(self):
        (self.core() + self.job()).encode('ascii')

    def test_core_has_no_docstrings_and_no_new_syntax(self):
        for node in itertools.chain(*[ast.walk(ast.parse(text)) for text in (self.core(), self.job())]):
            line = getattr(node, 'lineno', 0)
            self.assertNotIsInstance(node, ast.JoinedStr, 'f-string in line %d' % line)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                self.assertIsNone(ast.get_docstring(node), 'docstring near line %d' % line)

    def test_core_has_no_string_over_several_lines(self):
        """So that shortening needs a regular expression and no tokenizer."""
        for token in tokenize.generate_tokens(io.StringIO(self.core()).readline):
            if token.type == tokenize.STRING:
                self.assertEqual(token.start[0], token.end[0], token.string[:80])
                self.assertNotIn(token.string.lstrip('bruBRU')[:3], ('"""', "'''"), token.start)

    def test_shortening_changes_nothing(self):
        core = self.core()
        blank = shortened(core)
        self.assertEqual(core.count('\n'), blank.count('\n'))
        self.assertEqual(ast.dump(ast.parse(core)), ast.dump(ast.parse(blank)))

    def test_core_compiles_under_every_python(self):
        found = pythons()
        for source, version in itertools.product((self.core(), self.job()), by_version(found)):
            with self.subTest(python=version):
                sh(found[version], '-c', 'import sys; compile(sys.stdin.read(), "core", "exec")',
                   input=source.encode())

    def test_core_imports_only_the_standard_library(self):
        for node in ast.walk(ast.parse(self.core())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module]
                for name in names:
                    if (name or '').split('.')[0] == 'ansible':
                        self.assertTrue(node.col_offset,
                                        'ansible imported at import time: line %d' % node.lineno)

    def test_core_as_shipped_is_small(self):
        self.assertLessEqual(len(zlib.compress(shortened(self.core()).encode(), 9)), CORE_BYTES)

    def test_lower_sections_do_not_import_ansible(self):
        sections = self.sections()
        for noun in ('CLIENT', 'BROKER', 'HOPS', 'SHIPPING'):
            with self.subTest(section=noun):
                self.assertIn(noun, sections)
                self.assertNotRegex(sections[noun], r'(?m)^\s*(import ansible|from ansible)')

    def test_free_names_of_the_core_are_known(self):
        """Every name that is read there is bound there or built in: it cannot lean on what is above."""
        for text in (self.core(), self.job()):
            self.assertEqual(self.free_names(ast.parse(text)), [])

    def free_names(self, tree):
        bound = set(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)
        bound |= {'unicode', 'long', 'basestring', 'raw_input', 'xrange', 'execfile', 'unichr', 'reload',
                  '__file__', 'WindowsError'}
        read = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                bound |= {(alias.asname or alias.name).split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
            elif isinstance(node, ast.Global):
                bound |= set(node.names)
        return sorted(read - bound)

    def test_messages_and_handlers_agree(self):
        """Whatever is called on_<name> in the agent handles a kind of frame, and each kind is used."""
        tree = ast.parse(self.text)
        kinds = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
                     and getattr(node.targets[0], 'id', '') == 'KINDS')
        agent = next(node for node in tree.body
                     if isinstance(node, ast.ClassDef) and node.name == 'Agent')
        handlers = [node.name[3:] for node in agent.body
                    if isinstance(node, ast.FunctionDef) and node.name.startswith('on_')]
        self.assertEqual(sorted(set(handlers) - {'nonsense'} - set(kinds)), [])
        used = {node.id for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        for kind in kinds:
            self.assertTrue(kind in handlers or kind.upper() in used, kind)

    def test_no_name_is_defined_twice(self):
        """One of them would silently win or lose: a handler, a constant of another test."""
        for path in (PLUGIN, __file__):
            with open(path, encoding='utf-8') as file:
                tree = ast.parse(file.read())
            for scope in ast.walk(tree):
                if isinstance(scope, (ast.Module, ast.ClassDef)):
                    names = [name for node in scope.body for name in names_given(node)]
                    twice = [name for name, count in collections.Counter(names).items() if count > 1]
                    self.assertEqual(twice, [], getattr(scope, 'name', path))

    def test_version_is_consistent(self):
        version = re.search(r"(?m)^__version__ = '([^']+)'", self.text)
        self.assertTrue(version, 'no __version__')
        done = subprocess.run([sys.executable, PLUGIN, '--version'], stdout=subprocess.PIPE, check=True)
        self.assertIn(version.group(1), done.stdout.decode())

    def test_readme_commands_exist(self):
        readme = os.path.join(HERE, 'README.rst')
        if not os.path.exists(readme):
            self.skipTest('no plugin: README.rst is not here')
        with open(readme, encoding='utf-8') as file:
            text = file.read()
        self.assertLessEqual(text.count('\n'), 120)
        for program in re.findall(r'python3 (\w+\.py)', text):
            self.assertTrue(os.path.exists(os.path.join(HERE, program)), program)
        for command in re.findall(r'mitogen_single\.py (\w+)', text):
            self.assertRegex(self.text, r"['\"]%s['\"]" % command)
        for workload in re.findall(r'test_single\.py bench ((?:\w+ ?)+)', text):
            self.assertLessEqual(set(workload.split()), set(WORKLOADS))

    def test_each_promise_of_security_has_its_test(self):
        with open(os.path.join(HERE, 'README.rst'), encoding='utf-8') as file:
            section = re.search(r'\nSecurity\n-+\n\n(.*?)\n\n\n', file.read(), re.S)[1]
        self.assertEqual(re.findall(r'\S.*?[.;](?= |$)', section.replace('\n', ' ')), list(PROMISES))
        for name in ' '.join(PROMISES.values()).split():
            case, method = name.split('.')
            self.assertTrue(hasattr(globals()[case], method), name)

    def test_repository_is_what_it_says(self):
        if not os.path.isdir(os.path.join(HERE, '.git')):
            self.skipTest('not on this ansible-core: not a checkout')
        names = sh('git', '-c', 'safe.directory=*', '-C', HERE, 'ls-files').split()
        allowed = {'mitogen_single.py', 'test_single.py', 'README.rst', 'LICENSE'}
        self.assertEqual([name for name in names if name not in allowed and name[0] != '.'], [])


# 8 PIPE #########################################################################################
# What is sent to targets, started as a target starts it, in every Python that is here: 2.7 to the newest.

HEADER = struct.Struct('>BBIII')
SHAM = {        # the least that a module needs: its own text, and something that is called basic
    'ansible/__init__.py': '', 'ansible/module_utils/__init__.py': '', 'ansible/modules/__init__.py': '',
    'ansible/module_utils/basic.py': 'import random\n_ANSIBLE_ARGS = None\nTOLD, FLAGS, IS_FIRST = [], {}, True\n'
                                       'def remove_values(*args): pass\n',
    'ansible/modules/sham.py': 'import os, sys\n'
                               'from ansible.module_utils import basic\n'
                               'sys.stdout.write(__name__ + " " + basic._ANSIBLE_ARGS.decode() + os.environ["SHAM"])\n'
                               'sys.stderr.write(__file__)\n'
                               'sys.exit(7)\n',
    'ansible/modules/rolls.py': 'import os, random, sys\n'
                                'files = [name for name in os.listdir("/dev/fd") if os.path.exists("/dev/fd/" + name)\n'
                                '         and os.readlink("/dev/fd/" + name) != "/dev/urandom"]\n'    # Python 2.7's own
                                'sys.stdout.write("%r %s" % (random.random(), " ".join(sorted(files))))\n'
                                'sys.exit(0)\n',
    'ansible/modules/stays.py': '''
        import json, os, sys, tempfile
        from ansible.module_utils import basic
        mask = os.umask(0)
        print(json.dumps([os.getcwd(), mask, os.environ.get("SOIL"), os.environ["PATH"],
                          len(sys.path), basic.TOLD, basic.FLAGS, basic.IS_FIRST,
                          sys.excepthook is sys.__excepthook__, tempfile.gettempdir(), os.getpid()]))
        os.chdir("/usr")
        os.environ["SOIL"] = "left"
        sys.path.append("/left")
        sys.excepthook = len
        basic.TOLD.append("left")
        basic.FLAGS["left"], basic.IS_FIRST = True, False
        sys.exit(int(basic._ANSIBLE_ARGS.decode()))
        '''.replace('\n        ', '\n'),
}


class Core:
    """One agent, and the other end of its pipes."""

    def __init__(self, python, text):
        core = zlib.compress(shortened(text).encode('ascii'), 9)
        stage = ('import os,zlib\nos.write(1,b"READY")\nd=b""\nwhile len(d)<%d:d+=os.read(0,%d-len(d))\n'
                 'g=dict(__name__="mitogen_single")\n'
                 'exec(compile(zlib.decompress(d),"mitogen_single.py","exec"),g)\ng["main"](d,False)'
                 % (len(core), len(core)))
        self.process = subprocess.Popen([python, '-c', stage], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, bufsize=0)
        self.write(core)
        assert self.read(5) == b'READY'
        self.requests = 0
        self.hello = json.loads(self.frame()[3][4:].decode())

    def write(self, data):
        self.process.stdin.write(data)

    def read(self, size):
        data = b''
        while len(data) < size:
            more = self.process.stdout.read(size - len(data))
            if not more:
                raise EOFError(self.process.stderr.read().decode())
            data += more
        return data

    def frame(self):
        kind, _, _, request, size = HEADER.unpack(self.read(HEADER.size))
        return KINDS[kind], request, size, self.read(size)

    def send(self, kind, payload, request=0):
        self.write(HEADER.pack(KINDS.index(kind), 0, 1, request, len(payload)) + payload)

    def call(self, request, body=b'', **head):
        text = json.dumps(head).encode()
        self.send('call', struct.pack('>I', len(text)) + text + body, request)

    def answer(self, request):
        """-> (exit code, stdout, stderr)"""
        out = {1: b'', 2: b''}
        while True:
            kind, asked, _, payload = self.frame()
            assert asked == request, (kind, asked)
            if kind == 'data':
                out[ord(payload[:1])] += payload[1:]
            else:
                return json.loads(payload[4:].decode()).get('rc', payload), out[1].decode(), out[2].decode()

    def end(self):
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        return self.process.wait(10)


KINDS = ('hello', 'call', 'data', 'end', 'ack', 'reply', 'fail', 'cancel', 'blobs', 'share', 'route', 'down')


class PipeCore(unittest.TestCase):

    def each(self):
        with open(PLUGIN, encoding='utf-8') as file:
            above, fence, below = file.read().partition('\n' + FENCE)
        for name, python in sorted(pythons().items()):
            with self.subTest(python=name):
                core = Core(python, '\n' * above.count('\n') + fence + below)
                try:
                    yield core
                finally:
                    core.end()

    def test_says_who_it_is(self):
        for core in self.each():
            self.assertEqual(core.hello['user'], pwd.getpwuid(os.getuid()).pw_name)
            self.assertEqual(core.hello['pid'], core.process.pid)

    def test_runs_commands(self):
        for core in self.each():
            core.call(1, b'input', call='exec', argv=['/bin/sh', '-c', 'cat; echo err >&2; exit 3'])
            self.assertEqual(core.answer(1), (3, 'input', 'err\n'))
            core.call(2, call='exec', argv=['/nonexistent/program'])
            code, out, err = core.answer(2)
            self.assertEqual((code, out), (127, ''))
            self.assertIn('/nonexistent/program', err)

    def run_module(self, core, name, args, again, env):
        """-> (exit code, stdout, stderr) of one of the modules above"""
        digests = {path: hashlib.sha1(text.encode()) for path, text in SHAM.items()}
        table = json.dumps({path: digest.hexdigest() for path, digest in digests.items()}, sort_keys=True).encode()
        toc = hashlib.sha1(table)
        if not core.requests:
            blobs = [(toc, table)] + [(digests[path], text.encode()) for path, text in SHAM.items()]
            core.send('blobs', b''.join(name.digest() + struct.pack('>I', len(blob)) + blob for name, blob in blobs))
        core.requests += 1
        core.call(core.requests, args, call='run', toc=toc.hexdigest(), fqn='ansible.modules.' + name, profile='',
                  rlimit=0, env=env, interpreter=[core.hello['executable']], again=again)
        return core.answer(core.requests)

    def test_runs_modules_from_ram(self):
        for core in self.each():
            for again in (False, False, True):
                code, out, err = self.run_module(core, 'sham', b'args ', again, {'SHAM': 'env'})
                self.assertEqual((code, out), (7, '__main__ args env'), err)
                self.assertTrue(err.endswith('.zip/ansible/modules/sham.py'), err)

    def test_modules_do_not_inherit_what_is_the_agents(self):
        for core in self.each():
            rolled = set()
            for _ in range(3):
                code, out, err = self.run_module(core, 'rolls', b'', False, {})
                rolled.add(out.split()[0])
                self.assertEqual(out.split()[1:], ['0', '1', '2'], err)
            self.assertEqual(len(rolled), 3, 'the same random numbers')

    def test_modules_that_may_follow_each_other_in_one_process(self):
        for core in self.each():
            seen, pids = [], []
            for n, (code, again) in enumerate([(0, True)] * 6 + [(0, False), (0, True), (7, True), (0, True)]):
                env = {'TMPDIR': '/var/tmp'} if n % 2 else {}
                end, out, err = self.run_module(core, 'stays', b'%d' % code, again, env)
                self.assertEqual(err, '')
                self.assertEqual(end, code)
                *state, place, pid = json.loads(out)
                self.assertEqual(place == '/var/tmp', n % 2 == 1)
                if n == 5:
                    self.assertEqual(os.readlink('/proc/%d/cwd' % pid), '/')
                seen.append(state)
                pids.append(pid)
            self.assertEqual(seen, [seen[0]] * 10)
            self.assertEqual(len(set(pids[:6])), 1, pids)
            self.assertNotEqual(pids[6], pids[5], 'one that may not follow did')
            self.assertEqual(pids[7:9], pids[4:6])
            self.assertNotIn(pids[9], pids[:9], 'one followed a failure')

    def test_names_the_true_line(self):
        with open(PLUGIN, encoding='utf-8') as file:
            lines = file.read().splitlines()
        for core in self.each():
            core.send('share', b'')
            with self.assertRaises(EOFError) as caught:
                while True:
                    core.frame()
            found = re.findall(r'"mitogen_single.py", line (\d+), in on_share', str(caught.exception))
            self.assertIn('struct.unpack_from', lines[int(found[0]) - 1])

    def test_files(self):
        text, noise = b'line\n' * 60000, os.urandom(300000)
        for core in self.each():
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, 'file')
                core.call(1, call='put', path=path, mode=0o640, more=True)
                core.send('data', b'\4' + noise, 1)
                core.send('data', b'\5' + zlib.compress(text[:131072]), 1)
                core.send('end', b'', 1)
                self.assertEqual([core.frame()[0] for n in range(3)], ['ack', 'ack', 'reply'])
                with open(path, 'rb') as file:
                    self.assertEqual(file.read(), noise + text[:131072])
                self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o640)
                for content, squeeze in ((text, True), (noise, True), (text, False), (b'', True)):
                    with open(path, 'wb') as file:
                        file.write(content)
                    core.call(2, call='get', path=path, squeeze=squeeze)
                    pieces = self.pieces(core, 2)
                    self.assertEqual(b''.join(zlib.decompress(piece[1:]) if piece[:1] == b'\5' else piece[1:]
                                              for piece in pieces), content)
                    self.assertEqual(sum(map(len, pieces)) < len(content), squeeze and content == text)

    def pieces(self, core, request):
        """Of a file: each is acknowledged when it is here."""
        found = []
        while True:
            kind, asked, _, payload = core.frame()
            self.assertEqual(asked, request)
            if kind == 'reply':
                return found
            self.assertEqual(kind, 'data', payload)
            found.append(payload)
            core.send('ack', b'', request)

    def test_a_piece_that_swells_is_refused(self):
        for core in self.each():
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, 'file')
                with open(path, 'w') as file:
                    file.write('old')
                core.call(1, call='put', path=path, mode=0o600, more=True)
                core.send('data', b'\5' + zlib.compress(bytes(1 << 20)), 1)
                kind, _, _, payload = core.frame()
                self.assertEqual(kind, 'fail')
                self.assertIn(b'too long', payload)
                self.assertEqual(os.listdir(folder), ['file'])
                with open(path) as file:
                    self.assertEqual(file.read(), 'old')

    def test_requests_take_turns(self):
        """A reply goes in front of files that are waiting to leave, and these leave alternately."""
        for core in self.each():
            with tempfile.NamedTemporaryFile() as big, tempfile.NamedTemporaryFile('r') as told:
                big.write(os.urandom(1 << 20))
                big.flush()
                for request in (1, 2, 3, 4):
                    core.call(request, call='get', path=big.name, squeeze=False)
                core.call(5, call='exec', argv=['/bin/sh', '-c', 'echo $$ > %s' % told.name])
                wait_for(lambda: os.path.getsize(told.name), 5, 'it does not start')
                child = int(told.read())
                wait_for(lambda: not os.path.exists('/proc/%d' % child), 5, 'it does not end')
                order = [core.frame()[1] for n in range(4 * 4 + 1)]
                after = order[order.index(5) + 1:]
                self.assertGreater(len(after), 5, order)
                self.assertNotIn(True, [one == next for one, next in zip(after[:5], after[1:5])], order)

    def test_a_word_that_means_nothing(self):
        """Sent for the sake of firewalls."""
        for core in self.each():
            core.send('ack', b'')
            core.call(1, call='exec', argv=['/bin/sh', '-c', 'echo on'])
            self.assertEqual(core.answer(1), (0, 'on\n', ''))

    def test_garbage_ends_it(self):
        for core in self.each():
            core.write(b'\xff' * 64)
            with self.assertRaises(EOFError):
                core.frame()
            self.assertEqual(core.end(), 0)

    def test_end_of_input_ends_it_and_its_children(self):
        for core in self.each():
            with tempfile.NamedTemporaryFile('r') as told:
                core.call(1, call='exec', argv=['/bin/sh', '-c', 'trap "" TERM; echo $$ > %s; sleep 60' % told.name])
                wait_for(lambda: os.path.getsize(told.name), 5, 'it does not start')
                child = int(told.read())
            core.end()
            wait_for(lambda: not os.path.exists('/proc/%d' % child), 3, 'its child lives on')


class Wire:
    """A link of `rate` bytes a second and `trip` seconds there and back, on a clock of its own."""

    def __init__(self, rate, trip):
        self.rate = rate
        self.trip = trip
        self.time = 0
        self.free = 0                   # when the last piece has left
        self.due = collections.deque()  # when the acknowledgements arrive
        self.carried = 0

    def read(self, size):
        return bytes(size)

    def send(self, kind, payload):
        self.free = max(self.free, self.time) + len(payload) / self.rate
        self.due.append(self.free + self.trip)
        self.carried += len(payload)

    def run(self, sender, seconds):
        """-> (bytes a second, seconds that something small would have to queue at most)"""
        began, carried, queue = self.time, self.carried, 0
        while self.time < began + seconds:
            self.time = self.due.popleft()
            sender.taken()
            queue = max(queue, self.free - self.time)
        return (self.carried - carried) / (self.time - began), queue


class PipeWindow(unittest.TestCase):
    """How much of a file is under way follows the link."""

    def sender(self, wire):
        names = {'__name__': 'core'}
        with open(PLUGIN, encoding='utf-8') as file:
            exec(compile('#' + file.read().partition('\n' + FENCE)[2], PLUGIN, 'exec'), names)
        names['now'] = lambda: wire.time
        sender = names['Sender'](wire, False, wire.send, None)
        sender.over = True              # never: the file has no end
        sender.more()
        return sender

    def test_full_and_short_queue(self):
        for rate, trip in ((1e6, 0.01), (1e7, 0.05), (3e7, 0.05), (1e8, 0.001)):
            with self.subTest(rate=rate, trip=trip):
                wire = Wire(rate, trip)
                sender = self.sender(wire)
                wire.run(sender, 3)
                reached, queue = wire.run(sender, 10)
                self.assertGreater(reached, 0.9 * rate)
                self.assertLess(queue, 0.07 + 1e5 / rate)

    def test_long_way(self):
        wire = Wire(1e12, 0.2)
        sender = self.sender(wire)
        wire.run(sender, 5)
        reached, queue = wire.run(sender, 10)
        self.assertGreater(reached, 15e6)
        self.assertLess(reached, 25e6)      # 4 MiB at a time: so much memory it takes

    def test_way_that_becomes_longer(self):
        wire = Wire(1e7, 0.005)
        sender = self.sender(wire)
        wire.run(sender, 5)
        wire.trip = 0.15
        wire.run(sender, 10)
        self.assertGreater(wire.run(sender, 10)[0], 0.8e7)


# What a hostile target may send, to a real Broker in a process of its own: three agents, of which the second is behind
# the first; the first one speaks garbage while requests to all of them, and a hop, are open.
GARBAGE = r'''
import json, os, random, resource, socket, struct, sys, zlib
import mitogen_single as ms

# What a program can do with what it was told, by the names of Python's audit events.
DEEDS = ('exec', 'compile', 'import', 'open', 'pickle.', 'marshal.', 'subprocess.', 'os.', 'shutil.', 'ctypes.', 'socket.')
deeds = []
listening = False
sys.addaudithook(lambda name, args: listening and name.startswith(DEEDS) and deeds.append((name, args)))

class Garbage:
    def __init__(self, number):
        self.random = random.Random(number)
        self.broker = ms.Broker(socket.socketpair()[0])
        self.streams = [self.stream(self.broker.from_agent) for _ in range(2)]
        self.clients = [self.stream(self.broker.from_client) for _ in range(3)]
        for client, _ in self.clients:
            client.closed = self.broker.client_gone
            self.broker.clients[client] = {}
        hello = dict(user='u', names=['/usr/bin/python3'], python=[3, 9, 1], executable='/usr/bin/python3')
        for key, parent, stream in (('bad', None, 0), ('behind', 'bad', 0), ('good', None, 1)):
            link = ms.Link(next(self.broker.serial), dict(key=key, spec={}), self.broker.links.get(parent), None)
            link.hello, link.stream = hello, self.streams[stream][0]
            self.broker.links[key] = self.broker.numbers[link.number] = link
        bad = self.broker.links['bad']
        self.streams[0][0].closed = lambda stream, why: self.broker.link_is_down(bad, why)
        for which, key in enumerate(('bad', 'good')):
            self.ask(which, 1, dict(call='exec', to=[key], interpreter=None))
        self.ask(2, 1, dict(call='open', key='hop', parent='bad', most=20, spec={}))
        self.ask(0, 2, dict(call='exec', to=['behind'], interpreter=None))

    # A stream of the broker's, and our end of it.
    def stream(self, receive):
        ours, theirs = socket.socketpair()
        fd = ms.private(theirs.detach())
        stream = ms.Stream(self.broker.loop, fd, fd, receive, lambda stream, why: None)
        stream.listen()
        ours.setblocking(False)
        return stream, ours

    def ask(self, client, request, head):
        stream = self.clients[client][0]
        stream.receive(stream, ms.CALL, 0, request, ms.pack(head))

    # Like what an agent may say, then spoiled.
    def frame(self):
        rnd = self.random
        kind = rnd.choice((ms.DATA, ms.ACK, ms.REPLY, ms.FAIL, ms.DOWN, ms.HELLO, ms.CALL, ms.BLOBS,
                           rnd.randrange(256)))
        head = rnd.choice(({'rc': 0}, {'kind': 'lost', 'text': 'x'}, {'text': 'gone'}, {'user': 'u', 'names': ['p']},
                           {'names': [1]}, {'names': None, 'user': None}, {}, [], 1, None,
                           {'kind': ['lost'], 'text': {}}, {'rc': 10 ** 4000},
                           {'text': '\ud800', 'kind': '\udcff'}, {'rc': float('nan')}))
        text = rnd.choice((lambda: json.dumps(head).encode(),) * 6 + (lambda: b'[' * 100000, lambda: b'{"a":' * 50000,
                           lambda: b'\xff' * 9, lambda: b'"' + b'9' * 100000, lambda: b'9' * 9999))()
        size = rnd.choice((len(text),) * 9 + (0, 1 << 31, len(text) + 1))
        payload = rnd.choice((lambda: struct.pack('>I', size) + text + b'body',) * 6 + (
            lambda: rnd.randbytes(rnd.randrange(40)), lambda: b'', lambda: b'\1' * rnd.randrange(200000)))()
        flags = rnd.choice((0,) * 9 + (1, rnd.randrange(256)))
        if flags == 1:
            payload = rnd.choice((lambda: zlib.compress(payload), lambda: zlib.compress(bytes(40 << 20), 1) if
                                  rnd.random() < 0.02 else b'x', lambda: payload))()
        size = rnd.choice((len(payload),) * 19 + (0, 1 << 24, (1 << 24) + 1, (1 << 32) - 1, len(payload) // 2))
        return ms.HEADER.pack(kind, flags, rnd.choice((1,) * 9 + (2, 3, 99)), rnd.choice((4, 7) * 4 + (0, 5, 6, 8, 9)),
                              size) + payload

    def run(self):
        frames = [self.frame() for _ in range(self.random.randrange(1, 9))]
        text = b''.join(frames + frames[:self.random.randrange(2)])
        for _ in range(self.random.randrange(3)):
            at = self.random.randrange(len(text))
            text = text[:at] + bytes([self.random.randrange(256)]) + text[at + 1:]
        bad = self.streams[0][0]
        for piece in [text[at:at + 100000] for at in range(0, len(text), 100000)]:
            if bad.open:
                self.feed(bad, piece)
        assert not deeds, deeds
        assert sum(map(len, bad.inbox)) <= ms.MAX_FRAME + 300000
        assert bad.open == ('bad' in self.broker.links), 'a link without a stream, or the other way round'
        self.heard(0), self.heard(2)
        assert self.heard(1) == [], 'a reply was credited to another request'
        good = self.broker.links['good']
        ours = [ours for ours, asked in self.broker.requests.items() if asked.link is good]
        self.streams[1][0].feed(ms.HEADER.pack(ms.REPLY, 0, good.number, ours[0], 10) + ms.pack({}) + b'good')
        assert self.heard(1) == [(ms.REPLY, 1, ms.pack({}) + b'good')], 'another link was harmed'
        self.ask(2, 2, dict(call='open', key='hop', parent='bad', most=20, spec={}, believed=[]))
        for stream, ours in self.streams + self.clients:
            stream.close('the end')
            ours.close()
        os.close(self.broker.loop.wake), os.close(self.broker.loop.waker)

    def feed(self, stream, piece):
        global listening
        listening = True
        stream.feed(piece)
        listening = False

    # What a client was told: frames of its own requests, at most one answer each.
    def heard(self, client):
        stream, ours = self.clients[client]
        frames, data = [], b''
        while stream.open and (stream.rest or stream.prompt or stream.queues):
            stream.flush()
            try:
                data += ours.recv(1 << 24)
            except BlockingIOError:
                break
        while data:
            kind, _, _, request, size = ms.HEADER.unpack_from(data)
            frames.append((kind, request, data[ms.HEADER.size:ms.HEADER.size + size]))
            data = data[ms.HEADER.size + size:]
        assert all(request in ((1, 2), (1,), (1,))[client] for _, request, _ in frames)
        answers = [request for kind, request, _ in frames if kind in (ms.REPLY, ms.FAIL)]
        assert len(answers) == len(set(answers))
        return frames

for number in range(int(sys.argv[1]), int(sys.argv[2])):
    try:
        Garbage(number).run()
    except BaseException:
        print('stream', number)
        raise
idle = Garbage(0)
idle.broker.keep_in_touch()
stream, ours = idle.streams[1]
stream.flush()
assert ours.recv(9999).endswith(ms.HEADER.pack(ms.ACK, 0, idle.broker.links['good'].number, 0, 0)), 'out of touch'
print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
'''


# The same for a Client, which gets from the broker what an agent answered. Some plugin has set a timeout for sockets.
MALFORMED = r'''
import socket, struct, threading, zlib
import mitogen_single as ms

socket.setdefaulttimeout(0.01)
door, broker = socket.socketpair()

def answered(kind, payload, ask):
    client = ms.Client(door)
    theirs = socket.socket(fileno=socket.recv_fds(broker, 1, 1)[1][0])
    theirs.settimeout(None)
    text = ms.HEADER.pack(kind, 0, 0, 1, len(payload)) + payload
    threading.Timer(0.03, theirs.sendall, [text]).start()
    try:
        return ask(client), client.sock
    except ms.LinkLost as e:
        return str(e).split(' (')[0], client.sock

def head(text):
    return struct.pack('>I', len(text)) + text

for ask in (lambda client: client.call({}), lambda client: client.settle(client.post({}, b''))):
    said, sock = answered(ms.REPLY, ms.pack({'rc': 0}), ask)
    assert said == {'rc': 0} and sock, said
    for kind, payload in (
            (ms.REPLY, b''), (ms.REPLY, head(b'[]')), (ms.REPLY, head(b'{"a":' * 100000)),
            (ms.REPLY, ms.pack({'a': 'a' * (1 << 20)})), (ms.FAIL, ms.pack({})), (ms.FAIL, ms.pack({'kind': 'lost'})),
            (ms.FAIL, ms.pack({'kind': [], 'text': 'x'})), (ms.DATA, b''), (ms.DATA, b'\1x'), (ms.ACK, b'')):
        assert answered(kind, payload, ask) == ('malformed answer', None), (kind, payload[:40])

fd = ms.private(door.fileno())
try:
    ms.Stream(ms.Loop(), fd, fd, None, None).inflate(zlib.compress(b'x') + b'y')
except ms.ProtocolError:
    print('refused')
'''


class PipeGarbage(unittest.TestCase):
    COUNT = 3000

    def test_malformed_answers(self):
        said = sh(os.path.join(venv(NEWEST), 'bin', 'python'), '-c', MALFORMED, cwd=HERE)
        self.assertEqual(said, 'refused\n')

    def test_a_hostile_target_harms_nobody_else(self):
        """Another slice of all mutated streams on each day: a failure names the one that did it."""
        first = int(time.time()) // 86400 * self.COUNT % 10 ** 6
        said = sh(os.path.join(venv(NEWEST), 'bin', 'python'), '-c', GARBAGE, str(first), str(first + self.COUNT),
                  cwd=HERE)
        self.assertLess(int(said.split()[-1]), 400, 'MiB')


# 9 FACE #########################################################################################

THREE_TASKS = '''
- hosts: all
  gather_facts: false
  STRATEGY
  tasks:
    - command: echo one
    - stat: {path: /etc/hostname}
    - name: last
      shell: echo three
'''
NO_STRATEGY = {'ANSIBLE_STRATEGY': None, 'ANSIBLE_STRATEGY_PLUGINS': None}


class Installed(Real):
    """Wherever the file lies, one connection and one command over it show that it is at work."""

    def setUp(self):
        super().setUp()
        self.needs_plugin()

    def assert_at_work(self, play):
        self.assertEqual(play.rc, 0, play.tail())
        self.assertEqual(play.status('last'), 'ok', play.tail())
        self.assertEqual(dict(play.sessions()), {LAB.login: 1}, play.tail())

    def source(self):
        with open(PLUGIN, 'rb') as file:
            return file.read()


class RealInstall(Installed):
    def test_copied_beside_the_playbook(self):
        book = THREE_TASKS.replace('STRATEGY', 'strategy: mitogen_single')
        self.assert_at_work(self.run_ours(
            book, env=NO_STRATEGY, files={'strategy_plugins/mitogen_single.py': self.source()}))

    def test_reached_by_symlink(self):
        play = self.new(self.plugin, THREE_TASKS.replace('STRATEGY', ''),
                        env={'ANSIBLE_STRATEGY_PLUGINS': 'links'})
        os.mkdir(os.path.join(play.dir, 'links'))
        os.symlink(PLUGIN, os.path.join(play.dir, 'links', 'mitogen_single.py'))
        self.assert_at_work(play.run())

    def test_named_in_ansible_cfg(self):
        cfg = '[defaults]\nstrategy_plugins = %s\nstrategy = mitogen_single\n' % HERE
        self.assert_at_work(self.run_ours(
            THREE_TASKS.replace('STRATEGY', ''), env=NO_STRATEGY, files={'ansible.cfg': cfg}))

    def test_chosen_by_environment(self):
        self.assert_at_work(self.run_ours(THREE_TASKS.replace('STRATEGY', '')))

    def test_chosen_by_play_only(self):
        book = THREE_TASKS.replace('STRATEGY', 'strategy: mitogen_single')
        self.assert_at_work(self.run_ours(book, env={'ANSIBLE_STRATEGY': None}))

    def test_read_only_directory(self):
        play = self.new(self.plugin, THREE_TASKS.replace('STRATEGY', ''),
                        env={'ANSIBLE_STRATEGY_PLUGINS': 'ro'},
                        files={'ro/mitogen_single.py': self.source()})
        os.chmod(os.path.join(play.dir, 'ro'), 0o555)
        self.assert_at_work(play.run())

    def test_ansible_doc(self):
        play = self.new(self.plugin, None, program='ansible-doc',
                        args=['-t', 'strategy', 'mitogen_single'])
        play.argv.remove('-i')
        play.argv.remove('inventory.json')
        play.run()
        self.assertEqual(play.rc, 0, play.tail())
        self.assertIn('MITOGEN_SINGLE', play.out.upper())
        self.assertEqual(play.err, '')
        for name in re.findall(r'MITOGEN_SINGLE_[A-Z_]+', self.source().decode().split(FENCE)[0]):
            self.assertIn(name, play.out, 'an option that the documentation does not name')

    def test_ad_hoc(self):
        play = self.run_ours(None, program='ansible', args=['all', '-m', 'command', '-a', 'echo ad hoc'])
        self.assertEqual(play.rc, 0, play.tail())
        self.assertIn('ad hoc', play.out)
        self.assertEqual(dict(play.sessions()), {LAB.login: 1})

    def test_console(self):
        play = self.run_ours(None, program='ansible-console', args=['all'],
                             stdin='command echo first\ncommand echo second\nexit\n')
        self.assertIn('first', play.out, play.tail())
        self.assertIn('second', play.out, play.tail())

    def test_doctor(self):
        play = self.new(self.plugin, None)
        play.argv = [os.path.join(self.plugin.venv, 'bin', 'python'), PLUGIN, 'doctor', '-i',
                     'inventory.json', 't1']
        play.run()
        self.assertEqual(play.rc, 0, play.tail())
        self.assertEqual(play.left_behind(), [])

    def test_doctor_names_the_failure(self):
        play = self.new(self.plugin, None, hosts={'t1': {'ansible_port': 1}})
        play.argv = [os.path.join(self.plugin.venv, 'bin', 'python'), PLUGIN, 'doctor', '-i',
                     'inventory.json', 't1']
        play.run()
        self.assertNotEqual(play.rc, 0, play.tail())
        self.assertIn('refused', play.out + play.err)

    def test_demo(self):
        play = self.new(self.plugin, None)
        play.argv = [os.path.join(self.plugin.venv, 'bin', 'python'), PLUGIN, 'demo']
        play.run()
        self.assertEqual(play.rc, 0, play.tail())
        self.assertIn('stock', play.out)
        self.assertEqual(play.left_behind(), [])

TWO_PLAYS = '''
- {hosts: all, gather_facts: false, strategy: FIRST, tasks: [{name: first, command: echo one}]}
- {hosts: all, gather_facts: false, strategy: SECOND, tasks: [{name: last, command: echo two}]}
'''
# As Mitogen's own does: made by somebody else, from a stock one that it asks Ansible for.
FOREIGN_STRATEGY = '''
    from ansible.plugins.loader import strategy_loader
    Linear = strategy_loader.get('linear', class_only=True)
    class StrategyModule(Linear):
        def run(self, *args):
            return super().run(*args)
'''


class RealDirectories(Installed):
    """The same file in directories of other plugins: at work under the stock strategies, without a word."""

    every_core = TELLING_CORES

    def assert_silent(self, play):
        self.assertNotIn('DEPRECAT', play.out + play.err)
        self.assertNotIn('mitogen_single', play.out + play.err)

    def test_playbook(self):
        for kind in ('callback', 'vars', 'connection', 'become', 'shell'):
            with self.subTest(kind):
                play = self.run_ours(TWO_PLAYS.replace('FIRST', 'linear').replace('SECOND', 'ansible.builtin.free'),
                                     env=NO_STRATEGY, files={kind + '_plugins/mitogen_single.py': self.source()})
                self.assert_at_work(play)
                self.assert_silent(play)

    def test_ad_hoc_and_console(self):
        for kind in ('callback', 'vars'):
            where = {'ANSIBLE_%s_PLUGINS' % kind.upper(): 'somewhere', 'ANSIBLE_CALLBACKS_ENABLED': None, **NO_STRATEGY}
            for program, args, stdin in (('ansible', ['all', '-m', 'command', '-a', 'echo done'], ''),
                                         ('ansible-console', ['all'], 'command echo again\ncommand echo done\n')):
                with self.subTest(kind=kind, program=program):
                    play = self.run_ours(None, program=program, args=args, stdin=stdin, env=where,
                                         files={'somewhere/mitogen_single.py': self.source()})
                    self.assertIn('done', play.out, play.tail())
                    self.assertEqual(dict(play.sessions()), {LAB.login: 1})
                    self.assert_silent(play)

    def test_collection(self):
        for kind, env in (('strategy', {'ANSIBLE_STRATEGY': 'acme.fast.mitogen_single'}),
                          ('callback', {'ANSIBLE_CALLBACKS_ENABLED': 'acme.fast.mitogen_single, msrecord'}),
                          ('vars', {'ANSIBLE_VARS_ENABLED': 'host_group_vars, acme.fast.mitogen_single'})):
            with self.subTest(kind):
                place = 'collections/ansible_collections/acme/fast/plugins/%s/mitogen_single.py' % kind
                self.assert_at_work(self.run_ours(THREE_TASKS.replace('STRATEGY', ''), env=dict(NO_STRATEGY, **env),
                                                  files={place: self.source()}))

    def test_several_at_once(self):
        """Another version, in a directory that is read later, leaves the work to the first, and says so."""
        files = {'callback_plugins/mitogen_single.py': self.source(), 'vars_plugins/some_name.py': self.source(),
                 'strategy_plugins/mitogen_free.py': self.source().replace(b"__version__ = '", b"__version__ = '9")}
        play = self.run_ours(TWO_PLAYS.replace('FIRST', 'linear').replace('SECOND', 'mitogen_free'),
                             env=NO_STRATEGY, files=files)
        self.assert_at_work(play)
        self.assertRegex(re.sub(r'\s+', ' ', play.err), 'mitogen_free.py is not used')

    def test_beside_others(self):
        """A play of another strategy plugin is not ours; and Ansible says of both once what it says of each."""
        play = self.run_ours(TWO_PLAYS.replace('FIRST', 'mitogen_single').replace('SECOND', 'foreign'),
                             env={'ANSIBLE_STRATEGY': None, 'ANSIBLE_VARS_PLUGINS': 'more'},
                             files={'strategy_plugins/foreign.py': FOREIGN_STRATEGY,
                                    'more/mitogen_single.py': self.source()})
        self.assertEqual(play.rc, 0, play.tail())
        self.assertEqual(dict(play.logins()), {LAB.login: 2})
        expected = int(by_version([self.core, '2.19'])[0] == '2.19')
        self.assertEqual((play.out + play.err).count('Use of strategy plugins not included'), expected, play.tail())

    @newest
    def test_beside_mitogen(self):
        """A run has one broker: ours until a play asks for Mitogen, then Mitogen's, whatever comes after."""
        env = dict(Engine('mitogen').environment(), ANSIBLE_STRATEGY=None)
        brokers = '{name: brokers, debug: {msg: "{{ lookup(\'pipe\', \'%s\') }}"}}' % (
            'ps -o pid= --ppid $(ps -o ppid= -p $PPID) | wc -l')
        book = ''.join('- {hosts: all, gather_facts: false, strategy: %s, tasks: [command: echo, %s]}\n' % (name, brokers)
                       for name in ('linear', 'mitogen_linear', 'linear'))
        counts = {}
        for engine, files in ((self.stock, {}), (self.plugin, {'callback_plugins/mitogen_single.py': self.source()})):
            play = self.new(engine, book, env=dict(NO_STRATEGY, **env), files=files, args=['-v']).run()
            self.assertEqual(play.rc, 0, play.tail())
            counts[engine.name] = [event['result']['msg'] for event in play.events()
                                   if event['event'] == 'runner_ok' and event['task'] == 'brokers']
        self.assertEqual(counts['plugin'][1:], counts['stock'][1:])
        if self.ours:
            self.assertEqual(play.out.count('mitogen_single: not used from here on'), 1, play.tail())

    def test_documentation(self):
        names = ('mitogen_single', 'mitogen_single_free', 'mitogen_linear', 'mitogen')
        play = self.new(self.plugin, None, program='ansible-doc', args=['-t', 'strategy', *names],
                        env={'ANSIBLE_STRATEGY_PLUGINS': 'names'},
                        files={'names/%s.py' % name: self.source() for name in names})
        play.argv[1:3] = []
        play.run()
        self.assertEqual(play.rc, 0, play.tail())
        self.assertEqual(play.out.count('MITOGEN_SINGLE_BOOT_TIMEOUT'), len(names), play.tail())


SETTINGS = '''
- hosts: all
  gather_facts: false
  vars: {mitogen_ssh_keepalive_count: "{{ 3 - 1 }}"}
  tasks:
    - {name: first, command: echo one}
    - {name: last, command: echo two}
'''


class RealSettings(Installed):
    def test_for_ssh(self):
        """By environment, ansible.cfg and variables of Mitogen's; t2 has one of its own."""
        log = '#!/bin/sh\necho "$@ " > %s/args.$$; exec ssh "$@"\n'
        hosts = {'t1': {}, 't2': {'ansible_host': '127.0.0.2', 'mitogen_single_ssh_compression': False}}
        for host in hosts.values():
            host['ansible_ssh_executable'] = './ssh.sh'
        play = self.new(self.plugin, SETTINGS, hosts=hosts, env={'MITOGEN_SINGLE_SSH_COMPRESSION': 'yes'},
                        files={'ansible.cfg': '[mitogen_single]\nssh_keepalive_interval = 17\n'})
        play.write_files({'ssh.sh': log % play.dir})
        self.assertEqual(play.run().rc, 0, play.tail())
        found = {}
        for path in glob.glob(os.path.join(play.dir, 'args.*')):
            with open(path) as file:
                args = file.read()
            found['t2' if ' 127.0.0.2 ' in args or '@127.0.0.2 ' in args else 't1'] = args
        for host, compression in (('t1', 'yes'), ('t2', 'no')):
            for option in ('Compression=' + compression, 'ServerAliveInterval=17', 'ServerAliveCountMax=2'):
                self.assertIn('-o %s ' % option, found[host])

    def test_disabled(self):
        """For one host, by a template; for one task; for all."""
        hosts = many_hosts(2)
        hosts['t2']['mitogen_single_enabled'] = '{{ 1 == 2 }}'
        play = self.run_ours(SETTINGS, hosts=hosts)
        self.assertEqual(play.rc, 0, play.tail())
        self.assertGreater(play.sessions()[LAB.login], 2)
        play = self.run_ours(THREE_TASKS.replace('STRATEGY', '') + '      vars: {mitogen_single_enabled: false}\n')
        self.assertEqual(play.status('last'), 'ok', play.tail())
        self.assertGreater(play.sessions()[LAB.login], 1)
        play = self.run_ours(THREE_TASKS.replace('STRATEGY', ''), env={'MITOGEN_SINGLE_ENABLED': '0'})
        self.assertEqual(play.status('last'), 'ok', play.tail())
        self.assertGreater(play.sessions()[LAB.login], 3)

    def test_bad_value(self):
        for name in ('STRATEGY', 'BOOT_TIMEOUT', 'MAX_AGENTS', 'WORKERS'):
            with self.subTest(name):
                play = self.run_ours(THREE_TASKS.replace('STRATEGY', ''), env={'MITOGEN_SINGLE_' + name: 'nonsense'})
                self.assertNotEqual(play.rc, 0, play.tail())
                self.assertIn('nonsense', play.out + play.err)


# 10 CONNECTIONS ##################################################################################

WHO = '''
- hosts: all
  gather_facts: false
  tasks:
    - name: who
      command: id -un
    - name: where
      shell: echo "${SSH_CONNECTION##* }"
    - name: module
      stat: {path: /etc/hostname}
'''
INI = 't1 ansible_host=127.0.0.1 ansible_python_interpreter=/usr/bin/python3\n'


class RealSsh(Real):
    every_core = OLDEST_CORE

    def test_variables_mean_what_they_mean(self):
        """Each host names its options another way, templated ones included."""
        wrapper = '#!/bin/sh\necho used >> "%s"\nexec ssh "$@"\n' % LAB.path('wrapper.log')
        hosts = {
            'plain': {},
            'templated': {'keys': LAB.root, 'door': LAB.port, 'ansible_port': '{{ door }}',
                          'ansible_ssh_private_key_file': '{{ keys }}/key',
                          'ansible_user': '{{ me }}', 'me': LAB.login},
            'old_names': {'ansible_host': None, 'ansible_port': None, 'ansible_user': None,
                          'ansible_ssh_host': '127.0.0.3',
                          'ansible_ssh_port': LAB.port, 'ansible_ssh_user': LAB.login},
            'extra_args': {'ansible_ssh_private_key_file': None,
                           'ansible_ssh_extra_args': '-i %s' % LAB.path('key')},
            'ssh_args': {'ansible_ssh_private_key_file': None, 'ansible_host': '127.0.0.4',
                         'ansible_ssh_args': '-o IdentityFile=%s' % LAB.path('key')},
            'executable': {'ansible_ssh_executable': 'PLAYDIR/wrapper', 'ansible_host': '127.0.0.5'},
            'no_control': {'ansible_ssh_args': '-o ControlMaster=no -o ControlPath=none',
                           'ansible_host': '127.0.0.6'},
        }
        LAB.write('wrapper', wrapper)
        os.chmod(LAB.path('wrapper'), 0o755)
        hosts['executable']['ansible_ssh_executable'] = LAB.path('wrapper')
        self.compare(WHO, hosts=hosts)
        self.assertIn('used', LAB.read('wrapper.log'))

    @newest
    def test_ansible_cfg_and_command_line(self):
        cfg = '''
            [defaults]
            remote_port = %d
            private_key_file = %s
            [ssh_connection]
            ssh_common_args = %s
            ''' % (LAB.port, LAB.path('key'), LAB.ssh_options('known_hosts'))
        stock, ours = self.compare(WHO, hosts=INI, files={'ansible.cfg': cfg}, args=['-u', LAB.login],
                                   logins={LAB.login: 1})
        self.compare(WHO, hosts=INI, args=[
            '-u', LAB.login, '--private-key', LAB.path('key'), '-e', 'ansible_port=%d' % LAB.port,
            '--ssh-common-args', LAB.ssh_options('known_hosts')], logins={LAB.login: 1})

    @newest
    def test_ssh_config_file(self):
        """Host names that only the user's own ssh configuration knows."""
        LAB.write('ssh_config',
                  'Host alias\n  HostName 127.0.0.1\n  Port %d\n  User %s\n  IdentityFile %s\n'
                  '  UserKnownHostsFile %s\n' % (LAB.port, LAB.login, LAB.path('key'),
                                                 LAB.path('known_hosts')))
        self.compare(WHO, hosts='alias ansible_python_interpreter=/usr/bin/python3\n',
                     logins={LAB.login: 1},
                     env={'ANSIBLE_SSH_ARGS': '-F %s' % LAB.path('ssh_config')})

    def test_one_connection_across_plays_and_hosts(self):
        book = WHO + WHO.lstrip('\n') + WHO.lstrip('\n')
        self.compare(book, hosts=many_hosts(3), logins={LAB.login: 3})

    @newest
    def test_two_users_are_two_connections(self):
        self.needs_root()
        self.compare(WHO, hosts={'a': {}, 'b': {'ansible_user': 'msapp'}},
                     logins={'mslab': 1, 'msapp': 1})

    @newest
    def test_user_of_one_task(self):
        self.needs_root()
        book = WHO + '    - name: as another\n      command: id -un\n      remote_user: msapp\n      vars: {ansible_user: msapp}\n'
        self.compare(book, logins={'mslab': 1, 'msapp': 1})

    def test_host_key_changed(self):
        self.compare_failure(WHO, 'unreachable', 'Host key verification failed',
                             hosts={'t1': {'ansible_ssh_common_args': LAB.ssh_options('wrong_hosts')}})

    @newest
    def test_host_key_checking_off(self):
        hosts = {'t1': {'ansible_ssh_common_args': LAB.ssh_options('no_such_hosts')}}
        self.compare(WHO, hosts=hosts, env={'ANSIBLE_HOST_KEY_CHECKING': '0'})
        os.unlink(LAB.path('no_such_hosts')) if os.path.exists(LAB.path('no_such_hosts')) else None

    @newest
    def test_host_key_unknown(self):
        self.compare_failure(WHO, 'unreachable', 'Host key verification failed', hosts={
            't1': {'ansible_ssh_common_args': LAB.ssh_options('no_such_hosts')}})

    @newest
    def test_key_refused(self):
        self.compare_failure(WHO, 'unreachable', 'Permission denied',
                             hosts={'t1': {'ansible_ssh_private_key_file': LAB.path('other_key')}})

    PASSWORD = {'ansible_ssh_private_key_file': None}

    def test_password(self):
        self.needs_root()
        hosts = {'t1': dict(self.PASSWORD, ansible_password=LAB.password)}
        self.compare_or_run(WHO, hosts, '2.19', shutil.which('sshpass'))

    @newest
    def test_password_from_the_command_line(self):
        self.needs_root()
        self.needs_plugin('stock may need sshpass')
        play = self.run_ours(WHO, hosts={'t1': dict(self.PASSWORD)}, files={'pw': LAB.password + '\n'},
                             args=['--connection-password-file', 'pw'])
        self.assertEqual(play.rc, 0, play.tail())

    @newest
    def test_password_in_a_template(self):
        self.needs_root()
        hosts = {'t1': dict(self.PASSWORD, ansible_ssh_pass='{{ vaulted }}', vaulted=LAB.password)}
        self.compare_or_run(WHO, hosts, '2.19', shutil.which('sshpass'))

    def compare_or_run(self, book, hosts, since, otherwise=False):
        """Where this stock Ansible cannot do it, the plugin still must."""
        if by_version([self.core, since])[0] == since or otherwise or not self.ours:
            return self.compare(book, hosts=hosts)
        play = self.run_ours(book, hosts=hosts)
        self.assertEqual(play.rc, 0, play.tail())
        self.assertEqual(play.result('who')['stdout'], LAB.login)

    @newest
    def test_wrong_password(self):
        self.needs_root()
        self.needs_plugin('stock may need sshpass')
        play = self.run_ours(WHO, hosts={'t1': dict(self.PASSWORD, ansible_password='nonsense')})
        self.assertEqual(play.rc, 4, play.tail())
        self.assertEqual(play.status('who'), 'unreachable', play.tail())
        self.assertRegex(play.result('who')['msg'], '(?i)permission denied|password')

    @newest
    def test_password_is_nowhere(self):
        """Not in any argv, environment or output of the run, even with -vvvvv."""
        self.needs_root()
        self.needs_plugin()
        book = WHO + '    - name: with sudo\n      become: true\n      command: sleep 1\n'
        hosts = {'t1': dict(self.PASSWORD, ansible_user='mspass', ansible_password=LAB.password,
                            ansible_become_password=LAB.password)}
        play = self.new(self.plugin, book, hosts=hosts, args=['-vvvvv']).start()
        seen = []
        while play.running() and time.time() < play.began + 60:
            for pid in all_pids():
                for name in ('cmdline', 'environ'):
                    if LAB.password in proc(pid, name):
                        seen.append('%s of %s' % (name, proc(pid, 'comm')))
            time.sleep(0.02)
        play.finish()
        record = json.dumps(play.events())
        self.assertEqual(seen, [])
        self.assertEqual(play.status('with sudo'), 'ok', play.tail())
        for text in (play.out, play.err, record, LAB.read('sshd.log'), LAB.read('sudo.log')):
            self.assertNotIn(LAB.password, text)

    def test_key_with_passphrase(self):
        """Stock Ansible does this only with an ssh-agent of its own: the result alone is checked."""
        self.needs_plugin('stock leaves the question to the user')
        name = 'ansible_ssh_private_key_passphrase' if self.core >= '2.19' else 'ansible_password'
        play = self.run_ours(WHO, hosts={
            't1': {'ansible_ssh_private_key_file': LAB.path('locked_key'), name: 'open sesame'}})
        self.assertEqual(play.rc, 0, play.tail())
        self.assertEqual(play.result('who')['stdout'], LAB.login)

    @newest
    def test_locked_key_without_passphrase(self):
        self.compare_failure(WHO, 'unreachable', 'Permission denied',
                             hosts={'t1': {'ansible_ssh_private_key_file': LAB.path('locked_key')}})


TREE_BOOK = """
- hosts: all
  gather_facts: false
  vars: {out: "/tmp/out.{{ inventory_hostname }}"}
  tasks:
    - {name: who, command: id -un}
    - {name: raw, raw: "echo $0 $HOME; ls -d /home/msapp"}
    - {name: place, file: {path: "{{ out }}", state: directory, mode: "0777"}}
    - {name: write, copy: {content: "text", dest: "{{ out }}/file", mode: "0640"}}
    - {name: read, fetch: {src: "{{ out }}/file", dest: fetched/}}
    - {name: script, script: s.sh one}
    - {name: fails, command: sh -c "echo err >&2; exit 3", ignore_errors: true}
    - name: another with sudo
      become: true
      become_user: msapp
      shell: id -un > {{ out }}/app; id -un
    - name: another with su
      become: true
      become_user: msapp2
      become_method: su
      command: id -un
    - {name: all, shell: "stat -c '%n %a %u' {{ out }}/*"}
"""

# A connection plugin of the user's; what it does with a command follows.
OWN_CONNECTION = """
    DOCUMENTATION = '''
        name: NAME
        short_description: a connection plugin of the user
        description: runs commands here, in some way
        author: tests
        options: {}
    '''
    import shlex, shutil
    IMPORT
    from ansible.plugins.connection import ConnectionBase
    class Connection(ConnectionBase):
        transport = 'NAME'
        has_pipelining = PIPES
        def _connect(self):
            return self
        def exec_command(self, cmd, in_data=None, sudoable=True):
            super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
            RUN
            return done.returncode, done.stdout, done.stderr
        def put_file(self, in_path, out_path):
            shutil.copyfile(in_path, out_path)
        def fetch_file(self, in_path, out_path):
            shutil.copyfile(in_path, out_path)
        def close(self):
            pass
"""
OWN_ARGV = "done = subprocess.run(%s + ['/bin/sh', '-c', cmd], input=in_data, capture_output=True)"
OWN_CONNECTIONS = {     # name: can stock Ansible pipe into it, what it does, why something is left to stock Ansible
    'prefixed': (True, OWN_ARGV % "['env', 'VIA=env']", []),
    'sudoed': (True, OWN_ARGV % "['sudo', '-n', '-u', 'msapp']", []),
    'in_a_shell': (True, "done = subprocess.run('cd /; sh -c ' + shlex.quote(cmd), shell=True, input=in_data, "
                   "capture_output=True)", ['takes a command apart']),
    'unpiped': (False, OWN_ARGV % """['sh', '-c', 'exec "$@" </dev/null', 'x']""", ['stdin is empty']),
    'terminal': (False, "done = subprocess.run(['script', '-qec', '/bin/sh -c ' + shlex.quote(cmd), '/dev/null'], "
                 "stdin=subprocess.DEVNULL, capture_output=True)", ['stdin is a terminal', 'takes a command apart']),
    'buffered': (True, OWN_ARGV % """['sh', '-c', 'cat > /tmp/buf; "$@" < /tmp/buf', 'x']""", ['no answer for']),
    'spoken_to': (False, "done = subprocess.run(['sh'], input=cmd.encode(), capture_output=True)",
                  ['given the command']),
    'programless': (False, "pipe = os.popen(cmd); out = pipe.read().encode(); done = types.SimpleNamespace("
                    "returncode=(pipe.close() or 0) >> 8, stdout=out, stderr=b'')", ['no program']),
}


def own_connection(name):
    pipes, run, _ = OWN_CONNECTIONS[name]
    text = OWN_CONNECTION.replace('NAME', name).replace('PIPES', str(pipes)).replace('RUN', run)
    return text.replace('IMPORT', 'import os, types' if name == 'programless' else 'import subprocess')


# Stands for the command lines of container engines that are not here: what follows the last `--`, or from the first
# /bin/sh on, is run here.
FAKE_ENGINE = """#!/bin/bash
echo "$(basename "$0") $*" >> LOG
case "$(basename "$0") $*" in
    jls*) echo j1 ioc-j2; exit;;
    iocage*) echo j2; exit;;
    podman*mount*|buildah*mount*) exit 1;;
    podman*' cp '*) to="${@: -1}"; cp "${@: -2:1}" "${to#*:}"; exit;;
esac
while [ $# -gt 0 ] && [ "$1" != /bin/sh ]; do shift; done
[ $# -eq 0 ] || exec "$@"
"""
ENGINES = {             # host: plugin, the name of its program
    'podman': ('containers.podman.podman', 'podman'), 'buildah': ('containers.podman.buildah', 'buildah'),
    'kubectl': ('kubernetes.core.kubectl', 'kubectl'), 'oc': ('community.okd.oc', 'oc'),
    'lxd': ('community.general.lxd', 'lxc'), 'incus': ('community.general.incus', 'incus'),
    'libvirt': ('community.libvirt.libvirt_lxc', 'virsh'),
    'j1': ('community.general.jail', 'jexec'), 'j2': ('community.general.iocage', 'jexec'),
}


class RealConnections(Real):
    every_core = OLDEST_CORE

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not ROOT:
            raise unittest.SkipTest(without_root())
        if not collections_path():
            raise unittest.SkipTest('no collections: PyPI is out of reach')

    def clean_tree(self):
        for path in glob.glob(LAB.path('tree/tmp/out*')) + glob.glob(LAB.path('tree/*/.ansible')):
            shutil.rmtree(path)
        LAB.docker.run('exec', Docker.NAME, 'sh', '-c', 'rm -rf /tmp/out* /root/.ansible')

    @newest
    def test_docker_chroot_nsenter(self):
        """One tree, three ways into it, and other accounts in it."""
        docker = LAB.container()
        hosts = {'c1': {'ansible_connection': 'docker', 'ansible_host': Docker.NAME, 'ansible_user': None},
                 'c2': {'ansible_connection': 'community.general.chroot', 'ansible_host': LAB.tree()},
                 'c3': {'ansible_connection': 'community.docker.nsenter', 'ansible_nsenter_pid': docker.pid,
                        'ansible_host': 'c3'}}
        self.clean_tree()
        stock, ours = self.compare(
            TREE_BOOK, hosts=hosts, files={'s.sh': '#!/bin/sh\necho "$# $1 $(pwd)"\n'}, args=['-v'],
            env={'DOCKER_HOST': docker.socket}, pipelining=True, between=self.clean_tree)
        wait_for(lambda: not docker.processes(), LEFTOVER_SECONDS, 'left in the container: %s' % docker.processes())
        if self.ours:       # nsenter gives a raw command to a shell on this side
            self.assertEqual(re.findall('<(.*)> stock Ansible runs this', ours.out), ['c3'], ours.tail())

    def test_by_way_of_others(self):
        """ssh, sudo, ssh, sudo, docker, su: what stock Ansible does when it goes there directly."""
        docker = LAB.container() if self.core == NEWEST else None
        hosts = {'bastion': {},
                 'inner': {'mitogen_via': 'sudo:root@{{ first }}', 'first': 'bastion', 'ansible_user': 'msnoisy'},
                 'again': {'mitogen_via': 'mstty@bastion', 'ansible_ssh_private_key_file': LAB.path('hop_key')},
                 'third': {'mitogen_via': 'sudo:root@again'}}
        if docker:
            hosts['box'] = {'mitogen_via': 'sudo:root@third', 'ansible_connection': 'docker', 'ansible_user': None,
                            'ansible_host': Docker.NAME, 'ansible_docker_extra_args': '-H ' + docker.socket}
            self.clean_tree()
        shutil.copy(LAB.path('key'), LAB.path('hop_key'))
        shutil.chown(LAB.path('hop_key'), 'mstty')
        self.compare('''
            - hosts: all
              gather_facts: false
              tasks:
                - {name: who, command: id -un}
                - {name: raw, raw: echo raw}
                - {copy: {src: big, dest: "/tmp/ms_way_{{ inventory_hostname }}"}}
                - {fetch: {src: "/tmp/ms_way_{{ inventory_hostname }}", dest: fetched/}}
                - {command: "md5sum /tmp/ms_way_{{ inventory_hostname }}"}
                - {file: {path: "/tmp/ms_way_{{ inventory_hostname }}", state: absent}}
                - {name: loop, command: "echo {{ item }}", loop: [1, 2, 3, 4]}
            - hosts: third
              gather_facts: false
              tasks: [{meta: reset_connection}]
            - hosts: all
              gather_facts: false
              tasks:
                - {name: after, command: id -un}
                - {name: become, command: id -un, become: true, become_method: su, become_user: msapp,
                   when: inventory_hostname == 'box'}
            ''', hosts=hosts, files={'big': 'line of text\n' * 100000}, pipelining=True,
            logins={'mslab': 4, 'mstty': 1, 'msnoisy': 1})

    @newest
    def test_passwords_on_the_way(self):
        """Those that the user types are for all hosts, and so for those on the way."""
        self.needs_plugin()
        keyless = {'ansible_ssh_private_key_file': None}
        play = self.run_ours(WHO.replace('hosts: all', 'hosts: inner'), files={'pw': LAB.password + '\n'}, hosts={
            'gate': dict(keyless, ansible_user='mspass'), 'inner': dict(keyless, mitogen_via='sudo:root@gate')},
            args=['--connection-password-file', 'pw', '--become-password-file', 'pw'])
        self.assertEqual(play.rc, 0, play.tail())
        self.assertEqual(dict(play.sessions()), {'mspass': 1, LAB.login: 1})

    @newest
    def test_no_way(self):
        """An unknown host, a circle, a closed port, no such account, nothing to go by: the others go on."""
        self.needs_plugin()
        hosts = {'t1': {}, 'lost': {'mitogen_via': 'nowhere'}, 'round': {'mitogen_via': 'circle'},
                 'circle': {'mitogen_via': 'round'}, 'closed': {'mitogen_via': 'shut'}, 'shut': {'ansible_port': free_port()},
                 'nobody': {'mitogen_via': 'sudo:msnobody@t1'}, 'odd': {'mitogen_via': 'sauce:root@t1'},
                 'silent': {'mitogen_via': 'sudo:root@asks'}, 'asks': {'ansible_user': 'mspass'},
                 'bare': {'ansible_user': 'msbare', 'mitogen_via': 'sudo:root@t1'}, 'ways': {'mitogen_via': 'sudo:root@t1'}}
        play = self.run_ours(tasks('{name: who, command: id -un}') +
                             '- {hosts: bare, gather_facts: false, tasks: [{name: raw, raw: echo raw}]}\n'
                             '- {hosts: ways, gather_facts: false, tasks: [{name: sync, synchronize: {src: s, dest: /tmp/ms}}]}\n',
                             hosts=hosts)
        said = {event['host']: event['result'].get('msg', '') for event in play.events()
                if event['event'] == 'runner_unreachable'}
        for host, message in {
                'lost': 'no way by nowhere: there is no such host in the inventory', 'round': 'in a circle',
                'circle': 'in a circle', 'closed': 'on the way by shut: .*Connection refused',
                'shut': 'Connection refused', 'nobody': 'on the way by sudo:msnobody@t1: .*msnobody', 'odd': 'Invalid become method .*sauce',
                'silent': 'on the way by sudo:root@asks: .*(Missing sudo password|a password is required)', 'bare': 'no agent, and so no way'}.items():
            self.assertRegex(said.get(host, ''), message, host)
        self.assertEqual([play.status('who', host) for host in ('t1', 'asks', 'ways')], ['ok'] * 3, play.tail())
        self.assertIn('cannot go by way of mitogen_via', play.result('sync')['msg'])

    @newest
    def test_options_of_docker(self):
        docker = LAB.container()
        hosts = {'c1': {'ansible_connection': 'community.docker.docker', 'ansible_docker_host': Docker.NAME,
                        'ansible_docker_extra_args': '-H ' + docker.socket, 'ansible_user': 'mslab',
                        'ansible_docker_extra_env': {'VAR': 'a b'}, 'ansible_docker_working_dir': '/usr'}}
        self.compare(tasks('shell: id -un; echo $VAR $HOME', 'raw: pwd; echo $VAR',
                           '{command: id -un, become: true}'), hosts=hosts, pipelining=True)

    @newest
    def test_no_such_container(self):
        docker = LAB.container()
        hosts = {'c1': {'ansible_connection': 'community.docker.docker'}, 't1': {}}
        env = {'DOCKER_HOST': docker.socket}
        self.compare_failure(WHO, 'unreachable', 'c1|No such container', hosts=hosts, env=env)
        self.compare(tasks('raw: id'), rc=2, hosts=hosts, env=env)

    @newest
    def test_no_such_directory(self):
        hosts = {'/nowhere': {'ansible_connection': 'community.general.chroot', 'ansible_host': None}, 't1': {}}
        self.compare_failure(WHO, None, 'not a directory', hosts=hosts)

    @newest
    def test_engines_that_are_not_here(self):
        """Every plugin that spawns a command line: one of them for a whole play, by the plugin's own options."""
        hosts, files = {}, {}
        for host, (plugin, program) in ENGINES.items():
            hosts[host] = {'ansible_connection': plugin, 'ansible_host': host, 'ansible_user': 'root'}
            for name in (program, 'jls', 'iocage'):
                files['bin/' + name] = FAKE_ENGINE.replace('LOG', LAB.path('engines.log'))
        hosts['kubectl'].update(ansible_kubectl_container='box', ansible_kubectl_config={'kind': 'Config'},
                                ansible_kubectl_extra_args='--v=1')
        LAB.write('engines.log', '')
        os.makedirs(os.path.join(LAB.root, 'bin'), exist_ok=True)
        book = tasks('command: id -un', 'stat: {path: /etc/hostname}',
                     '{shell: echo out; exit 3, ignore_errors: true}')
        for name, text in files.items():
            LAB.write(name, text)
            os.chmod(LAB.path(name), 0o755)
        path = '%s:%s' % (LAB.path('bin'), '/usr/sbin:/usr/bin:/sbin:/bin')
        self.compare(book, hosts=hosts, env={'PATH': path}, pipelining=True, without=('deprecations',),
                     between=lambda: LAB.write('engines.log', ''))
        calls = [line for line in LAB.read('engines.log').splitlines() if '/bin/sh' in line]
        if self.ours:
            self.assertEqual(sorted(line.split()[0] for line in calls),
                             sorted(program for plugin, program in ENGINES.values()))

    def test_plugins_of_the_user(self):
        hosts = {name: {'ansible_connection': name, 'ansible_host': name, 'ansible_user': None}
                 for name in OWN_CONNECTIONS}
        files = {'connection_plugins/%s.py' % name: own_connection(name) for name in OWN_CONNECTIONS}
        book = tasks('{shell: "echo $VIA; id -un", ignore_errors: true}', '{raw: id -un, ignore_errors: true}',
                     '{stat: {path: /etc/hostname}, ignore_errors: true}')
        stock, ours = self.compare(book, hosts=hosts, files=files, args=['-v'], pipelining=True, env={
            'ANSIBLE_CONNECTION_PLUGINS': 'connection_plugins', 'MITOGEN_SINGLE_BOOT_TIMEOUT': '3',
            'ANSIBLE_TIMEOUT': '1'})
        for name, (_, _, reasons) in OWN_CONNECTIONS.items() if self.ours else ():
            said = re.findall('<%s> stock Ansible runs this, there is no agent: (.*)' % name, ours.out)
            self.assertEqual(len(said), len(reasons), said)
            self.assertTrue(all(reason in line for reason, line in zip(reasons, said)), said)

    @newest
    def test_plugins_that_raise(self):
        files = {'connection_plugins/raising.py': own_connection('prefixed').replace(
                     'done =', 'raise ValueError("it will not"); done =').replace('prefixed', 'raising'),
                 'connection_plugins/broken.py': 'this is no Python\n'}
        hosts = {'t1': {}, 't2': {'ansible_connection': 'raising'}, 't3': {'ansible_connection': 'broken'},
                 't4': {'ansible_connection': 'nosuch'}}
        self.compare_failure(WHO, None, '.', hosts=hosts, files=files,
                             env={'ANSIBLE_CONNECTION_PLUGINS': 'connection_plugins'})

    @newest
    def test_python_comes_by_raw(self):
        """Where there is no Python shell commands run, and once one of them has brought it modules do."""
        tree = LAB.tree()
        python = os.path.basename(os.path.realpath('/usr/bin/python3'))
        here, there = os.path.join(tree, 'root', python), os.path.join(tree, 'usr/bin', python)
        hosts = {'c1': {'ansible_connection': 'community.general.chroot', 'ansible_host': tree}}
        os.rename(there, here)
        try:
            self.compare(tasks(
                'raw: id -un', 'script: s.sh', '{command: id -un, ignore_errors: true}',
                'raw: mv /root/%s /usr/bin' % python, 'command: id -un', '{command: id -un, become: true}'),
                hosts=hosts, files={'s.sh': '#!/bin/sh\npwd\n'}, pipelining=True, without=TEXTS,
                between=lambda: os.rename(there, here))
        finally:
            if os.path.exists(here):
                os.rename(here, there)


# 11 BECOME ######################################################################################

BECOME_WHO = '''
- hosts: all
  gather_facts: false
  become: true
  tasks:
    - name: root
      command: id -un
    - name: module as root
      file: {path: OUT, state: directory, owner: msapp, mode: "0777"}
    - name: another
      become_user: msapp
      copy: {content: "mine\\n", dest: OUT/mine, mode: "0644"}
    - name: not at all
      become: false
      command: id -un
    - name: environment of root
      shell: echo $HOME $USER $LOGNAME $SUDO_USER
    - name: root again
      command: pwd
'''
OWN_BECOME = '''
    DOCUMENTATION = """
        name: mybecome
        short_description: sudo by another name
        description: a become plugin of the user
        author: tests
        options:
          become_user: {description: user, default: root, vars: [{name: ansible_become_user}]}
          become_exe: {description: program, default: sudo, vars: [{name: ansible_become_exe}]}
          become_flags: {description: flags, default: '', vars: [{name: ansible_become_flags}]}
          become_pass: {description: password, vars: [{name: ansible_become_password}]}
    """
    from ansible.plugins.become import BecomeBase
    class BecomeModule(BecomeBase):
        name = 'mybecome'
        def build_become_command(self, cmd, shell):
            super().build_become_command(cmd, shell)
            if not cmd:
                return cmd
            return ' '.join(['sudo -H -n -u', self.get_option('become_user'), self._build_success_command(cmd, shell)])
    '''


# Stands for the become programs that are not here, and speaks as they do: on the terminal, with -S on stdin.
FAKE_BECOME = '''#!/usr/bin/python3
import getpass, os, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
prompt, failure = {
    'dzdo': ('', 'Sorry, try again.'),
    'pbrun': ('Password:', 'no'),
    'pfexec': ('', ''),
    'ksu': ('Kerberos password for me@HERE: ', 'Password incorrect'),
    'pmrun': ('Enter UPM user password:', 'no'),
    'sesu': ('Please enter your password:', 'Sorry, try again with sesu.'),
    'su': ('Mot de passe\\xa0: ', 'su: Authentication failure'),
    'sesame': ('Who knows? ', 'Not you'),
    'podman': ('', ''),
}[name]
if '-p' in words:
    prompt = words[words.index('-p') + 1]
if '-S' in words and prompt:
    os.write(2, prompt.encode())
    answer = sys.stdin.buffer.raw.readline().decode().strip()
else:
    answer = getpass.getpass(prompt) if prompt else None
if answer not in (None, 'PASSWORD'):
    sys.exit(failure)
user = 'msapp' if any(word.endswith('msapp') for word in words) else 'root'
command = words[words.index('/bin/sh'):] if '/bin/sh' in words else ['/bin/sh', '-c', words[-1]]
command = ['sudo', '-n', '-u', user] + command if name != 'podman' else command
os.execvp(command[0], command)
'''
PROMPTING = 'dzdo pbrun ksu pmrun sesu'.split()

# machinectl, and run0 of systemd 256: ask on the terminal, put one of their own under the data, are left by 0x1D three
# times in a row, do not wait for what runs in them when their stdin ends, and know no exit code of it.
FAKE_TERMINAL = '''#!/usr/bin/python3
import getpass, os, pty, sys, threading
words = sys.argv[1:]
user = next(word.strip('@').rpartition('=')[2] for word in words if word[-1:] == '@' or word[:7] == '--user=')
if sys.argv[0].endswith('machinectl'):      # Ansible knows no password for run0
    print('==== AUTHENTICATING FOR org.freedesktop ====', file=open('/dev/tty', 'w'))
    if getpass.getpass('Password: ') != 'PASSWORD':
        sys.exit('==== AUTHENTICATION FAILED ====')
    print('==== AUTHENTICATION COMPLETE ====', file=open('/dev/tty', 'w'))
pid, master = pty.fork()
if not pid:
    os.execvp('sudo', ['sudo', '-n', '-H', '-u', user or 'root'] + words[words.index('/bin/sh'):])

def copy(source, target):
    seen = b''
    while True:
        try:
            data = os.read(source, 4096)
        except OSError:
            break
        seen = seen[-2:] + data
        if not data or b'\\x1d' * 3 in seen and source == 0:
            break
        while data:
            data = data[os.write(target, data):]
    os._exit(0)

threading.Thread(target=copy, args=(0, master)).start()
copy(master, 1)
'''
SESAME = OWN_BECOME.replace('mybecome', 'sesame').replace('''
            super()''', '''
            self.prompt = 'Who'
            super()''').replace("'sudo -H -n -u'", "self.get_option('become_exe')") + '''
        fail = ('Not you',)
        def check_password_prompt(self, b_output):
            return b'Who knows?' in b_output
    '''


ZONE = '''
    #!/usr/bin/python
    import time
    from ansible.module_utils.basic import AnsibleModule
    AnsibleModule({}).exit_json(zone=time.tzname, now=time.strftime('%Z %z'), offset=time.timezone)
'''


# As the true ones, it makes the first folder for packages that the account has.
PIP = '''
    #!/usr/bin/python
    import os, shutil, site
    from ansible.module_utils.basic import AnsibleModule
    module = AnsibleModule({'state': {'type': 'str'}})
    folder = site.getusersitepackages()
    try:
        import ms_added
        found = ms_added.__name__
    except ImportError:
        found = None
    if module.params['state'] == 'absent':
        shutil.rmtree(folder)
    elif not found:
        os.makedirs(folder)
        open(os.path.join(folder, 'ms_added.py'), 'w').close()
    module.exit_json(changed=True, found=found, folder=folder)
'''


class RealBecome(Real):
    every_core = OLDEST_CORE
    pipelining = True

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not ROOT:
            raise unittest.SkipTest(without_root())

    def book(self, text=BECOME_WHO):
        return text.replace('OUT', self.out)

    def test_without_password(self):
        self.compare(self.book(), logins={'mslab': 1}, sudos={'root': 1, 'msapp': 1})

    @newest
    def test_settings_come_and_go(self):
        """What a variable or a keyword sets for one task is not what the next one has."""
        self.compare(tasks(
            '{command: id -un, become: true}', '{command: id -un, become: true, vars: {ansible_become_user: msapp}}',
            '{command: id -un, become: true}', '{command: id -un, become: true, become_user: msapp}',
            '{command: id -un, become: true}', '{command: id -un, become: true, vars: {ansible_become_flags: "-H -n -E"}}',
            '{command: printenv HOME, become: true, loop: [a, b, c]}',
            '{command: id -un, vars: {ansible_user: mspass}}', '{command: id -un}'))

    @newest
    def test_what_sessions_begin_with(self):
        """What a module changed of how processes begin counts for the next task; a job that is at work goes on."""
        self.needs_root()
        server = LAB.sshd('mount -t tmpfs tmpfs /mnt && mkdir /mnt/u /mnt/w && mount -t overlay -o lowerdir=/etc,upperdir=/mnt/u,'
                          'workdir=/mnt/w overlay /etc && echo "session required pam_env.so readenv=1" >> /etc/pam.d/sudo')
        self.addCleanup(server.stop)
        look = '{shell: "id -Gn; echo [$MS_ADDED]", become: true, become_user: msapp}', '{command: printenv MS_ADDED, become: true, ' \
               'failed_when: false, loop: [a, b, c]}'
        change = '{lineinfile: {path: /etc/environment, create: true, line: MS_ADDED=1, state: %s}, become: true}'
        groups = '{user: {name: msapp, groups: %s}, become: true}'
        shell = '{lineinfile: {path: ~/.bashrc, create: true, insertbefore: BOF, line: export MS_ADDED=2, state: %s}}'
        zones = ['zone: {}' if name is None else '{file: {src: /usr/share/zoneinfo/%s, dest: /etc/localtime, state: link, '
                 'force: true}, become: true}' % name for name in (None, 'Asia/Tokyo', None, 'Etc/UTC', None)]
        login = '{shell: "echo [$MS_ADDED]"}', '{shell: "echo [$MS_ADDED]", environment: {TZ: UTC}, loop: [a, b, c]}'
        packages = ['%s: {state: %s}' % (name, state) for name in ('pip', 'apt') for state in ('present', 'present', 'absent')]
        self.compare(tasks(
            *look, '{shell: sleep 1; id -un, become: true, become_user: msapp, async: 20, poll: 0, register: job}', groups % 'games',
            change % 'present', *look, '{async_status: {jid: "{{ job.ansible_job_id }}"}, register: done, until: done.finished, '
            'become: true, become_user: msapp, delay: 1}', groups % '""', change % 'absent', *look,
            *login, shell % 'present', *login, look[0], shell % 'absent', *login, *zones, *packages),
            files={'library/zone.py': ZONE, 'library/pip.py': PIP, 'library/apt.py': PIP},
            hosts={'t1': {'ansible_port': server.port}}, pipelining=True, without=('attempts',))

    @newest
    def test_by_command_line(self):
        self.compare(WHO, args=['-b', '--become-user', 'msapp'], sudos={'msapp': 1})

    def test_with_password_and_lecture(self):
        hosts = {'t1': {'ansible_user': 'mspass', 'ansible_become_password': LAB.password}}
        self.compare(self.book(), hosts=hosts, logins={'mspass': 1}, sudos={'root': 1, 'msapp': 1})

    @newest
    def test_password_from_a_file(self):
        hosts = {'t1': {'ansible_user': 'mspass'}}
        self.compare(WHO, hosts=hosts, args=['-b', '--become-password-file', 'pw'],
                     files={'pw': LAB.password + '\n'})

    def test_wrong_password(self):
        hosts = {'t1': {'ansible_user': 'mspass', 'ansible_become_password': 'nonsense'}}
        self.compare_failure(self.book(), None, '(?i)incorrect sudo password', hosts=hosts)

    def test_missing_password(self):
        self.compare_failure(self.book(), None, '(?i)missing sudo password',
                             hosts={'t1': {'ansible_user': 'mspass'}})

    @newest
    def test_unknown_user(self):
        book = self.book().replace('become_user: msapp', 'become_user: nosuchuser')
        self.compare_failure(book, None, '(?i)unknown user|nosuchuser', task='another')

    def test_requiretty(self):
        self.compare(self.book(), hosts={'t1': {'ansible_user': 'mstty'}}, pipelining=False)

    def test_su(self):
        book = '''
            - hosts: all
              gather_facts: false
              become: true
              become_method: su
              become_user: msapp
              tasks:
                - {name: who, command: id -un}
                - {name: module, stat: {path: /etc/hostname}}
                - {name: back, command: id -un, become: false}
            '''
        hosts = {'t1': {'ansible_become_password': LAB.password}}
        self.compare(book, hosts=hosts, logins={'mslab': 1})
        hosts['t1']['ansible_become_password'] = 'nonsense'
        self.compare_failure(book, None, '(?i)incorrect su password|authentication failure|password',
                             hosts=hosts)

    def test_plugin_of_the_user(self):
        book = self.book().replace('become: true\n  tasks',
                                   'become: true\n  become_method: mybecome\n  tasks')
        self.compare(book, files={'become_plugins/mybecome.py': OWN_BECOME},
                     sudos={'root': 1, 'msapp': 1},
                     env={'ANSIBLE_BECOME_PLUGINS': 'become_plugins'})

    def by_method(self, methods, fake=FAKE_BECOME, **more):
        """A host for each become plugin whose program is `fake`."""
        hosts = {}
        os.makedirs(LAB.path('become'), exist_ok=True)
        for method in methods:
            program = method.rpartition('.')[2]
            LAB.write('become/' + program, fake.replace('PASSWORD', LAB.password))
            os.chmod(LAB.path('become', program), 0o755)
            hosts[program] = dict({'ansible_become': True, 'ansible_become_method': method,
                                   'ansible_become_exe': LAB.path('become', program),
                                   'ansible_become_user': 'msapp', 'ansible_become_password': LAB.password}, **more)
        return hosts

    METHODS = ['community.general.' + name for name in PROMPTING + ['pfexec']] + ['ansible.builtin.su', 'sesame']
    OWN = {'files': {'become_plugins/sesame.py': SESAME}, 'env': {'ANSIBLE_BECOME_PLUGINS': 'become_plugins'}}

    def needs_collections(self):
        if not collections_path():
            self.skipTest('no collections: PyPI is out of reach')

    @newest
    def test_programs_that_are_not_here(self):
        """Each speaks another dialogue, which only its plugin knows."""
        self.needs_collections()
        stock, ours = self.compare(tasks('command: id -un', 'stat: {path: /etc/hostname}'), args=['-v'],
                                   hosts=self.by_method(self.METHODS), pipelining=False, **self.OWN)
        self.assertNotIn('stock Ansible runs this', ours.out)

    @newest
    def test_terminals_under_the_data(self):
        """Any byte gets through, there and back, also by an ssh that was told to make a terminal, too."""
        self.needs_collections()
        env = {'ANSIBLE_SSH_EXTRA_ARGS': '-tt'}     # on which stock Ansible insists, for these
        hosts = self.by_method(['community.general.machinectl', 'community.general.run0'], FAKE_TERMINAL)
        # What could be compressed would be, and nothing of it be seen.
        ends = b''.join(os.urandom(300) + b'\x1d\x1d\x1d\x1e\x1d1\x1e0\x1e' for n in range(1000)) + bytes(range(256))
        book = self.book(tasks(
            'command: id -un', '{name: fails, command: /bin/false, ignore_errors: true}',
            '{file: {path: OUT, state: directory, mode: "0777"}, vars: {ansible_become: false}, run_once: true}',
            'copy: {src: ends, dest: "OUT/{{ inventory_hostname }}", mode: "0644"}',
            'fetch: {src: "OUT/{{ inventory_hostname }}", dest: "back/{{ inventory_hostname }}", flat: true}',
            '{command: "echo {{ item }}", loop: [1, 2]}'))
        stock, ours = self.compare(book, hosts=hosts, env=env, files={'ends': ends}, args=['-v'], pipelining=False,
                                   logins={'mslab': 1}, without=('stderr', 'stderr_lines'))
        self.assertNotIn('stock Ansible runs this', ours.out)
        for name in hosts:
            with open(os.path.join(ours.dir, 'back', name), 'rb') as file:
                self.assertEqual(file.read(), ends)
        hosts['machinectl']['ansible_become_password'] = 'nonsense'
        self.compare(tasks('{command: id -un, ignore_errors: true}'), env=env, pipelining=False, without=TEXTS, hosts=hosts)

    @newest
    def test_agent_behind_a_terminal_is_killed(self):
        self.needs_collections()
        self.needs_plugin()
        hosts = self.by_method(['community.general.machinectl'], FAKE_TERMINAL)
        play = self.run_ours(tasks('{name: dies, shell: "sleep 0.2; kill -9 $(ps -o ppid= $PPID)", ignore_unreachable: true}',
                                   '{name: again, command: id -un}'), hosts=hosts, env={'ANSIBLE_SSH_EXTRA_ARGS': '-tt'})
        self.assertEqual(play.status('dies', 'machinectl'), 'unreachable', play.tail())
        self.assertEqual(play.result('again', 'machinectl')['stdout'], 'msapp')

    @newest
    def test_wrong_passwords(self):
        self.needs_collections()
        methods = [name for name in self.METHODS if not name.endswith('pfexec')]
        hosts = self.by_method(methods, ansible_become_password='nonsense')
        self.compare(tasks('{command: id -un, ignore_errors: true}'), hosts=hosts, pipelining=False, without=TEXTS,
                     **self.OWN)

    @newest
    def test_password_that_nobody_gave(self):
        """Stock Ansible waits for an answer for ever."""
        self.needs_plugin()
        play = self.run_ours(WHO, hosts=dict(self.by_method(['su'], ansible_become_password=None), t1={}),
                             env={'ANSIBLE_TIMEOUT': '1'})
        self.assertEqual((play.status('who', 'su'), play.status('module', 't1')), ('unreachable', 'ok'), play.tail())
        self.assertRegex(play.result('who', 'su')['msg'], 'privilege escalation prompt.*Mot de passe')

    @newest
    def test_doas(self):
        self.needs_collections()
        hosts = {'t1': {}, 't2': {'ansible_user': 'mspass', 'ansible_become_password': LAB.password}}
        for host in hosts.values():
            host.update(ansible_become_method='community.general.doas')
        self.compare_in_places(hosts, pipelining=False, logins={'mslab': 1, 'mspass': 1})

    @newest
    def test_doas_with_a_wrong_password(self):
        self.needs_collections()
        hosts = {'t1': {'ansible_user': 'mspass', 'ansible_become_password': 'nonsense',
                        'ansible_become_method': 'community.general.doas'}}
        self.compare_failure(self.book(), None, '(?i)incorrect|authentication failed', hosts=hosts)

    @newest
    def test_sudosu(self):
        self.needs_collections()
        hosts = {'free': {}, 'asked': {'ansible_user': 'mspass', 'ansible_become_password': LAB.password}}
        for host in hosts.values():
            host.update(ansible_become_method='community.general.sudosu', ansible_become=True, ansible_become_user='msapp')
        self.compare(tasks('command: id -un', 'shell: pwd'), hosts=hosts, pipelining=False,
                     logins={'mslab': 1, 'mspass': 1})

    @newest
    def test_podman_unshare(self):
        self.needs_collections()
        hosts = self.by_method(['containers.podman.podman_unshare'], ansible_connection='local',
                               ansible_become_user='root')
        path = '%s:/usr/sbin:/usr/bin:/sbin:/bin' % LAB.path('become')
        self.compare(tasks('command: id -un', 'stat: {path: /etc/hostname}'), hosts=hosts, env={'PATH': path})

    @newest
    def test_forwarded_agent(self):
        """With -E an ssh-agent that was forwarded is there for the become account too."""
        socket_path = LAB.path('agent')
        agent = subprocess.Popen(['ssh-agent', '-D', '-a', socket_path], stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: os.path.exists(socket_path), 5, 'no ssh-agent')
            hosts = {'t1': {'ansible_ssh_extra_args': '-o ForwardAgent=yes', 'ansible_become_flags': '-H -S -n -E'}}
            self.compare(tasks('{command: ssh-add -l, become: true, failed_when: false}'), hosts=hosts,
                         env={'SSH_AUTH_SOCK': socket_path}, without=('stderr', 'stderr_lines'))
        finally:
            agent.terminate()
            agent.wait()

    @newest
    def test_flags_and_executable(self):
        hosts = {'t1': {'ansible_become_flags': '-H -S -n', 'ansible_become_exe': '/usr/bin/sudo'}}
        self.compare(self.book(), hosts=hosts)

    @newest
    def test_parallel_hosts(self):
        self.compare_in_places(many_hosts(3), logins={'mslab': 3}, sudos={'root': 3, 'msapp': 3})

    def compare_in_places(self, hosts, **options):
        """Each host in a directory of its own."""
        place = self.out + '{{ inventory_hostname }}'
        book = BECOME_WHO.replace('path: OUT', 'path: "%s"' % place)
        book = book.replace('dest: OUT/mine', 'dest: "%s/mine"' % place)
        try:
            self.compare(book, hosts=hosts, between=self.remove, **options)
        finally:
            self.remove()

    def remove(self):
        for path in glob.glob(self.out + 't*'):
            shutil.rmtree(path)


# 12 MODULES #####################################################################################

PROBE = '''
    #!/usr/bin/python
    # -*- coding: utf-8 -*-
    from __future__ import absolute_import, division, print_function
    import json, os, pickle, signal, sys, threading
    from ansible.module_utils.basic import AnsibleModule

    class Thing(object):
        pass

    def crash(module):
        raise ValueError('crashed on purpose')

    def crash_in_module_utils(module):
        module.run_command(['x'], data=object())

    def junk_before(module):
        print('junk before the result')
        module.exit_json(changed=False, answer=1)

    def junk_after(module):
        try:
            module.exit_json(changed=False, answer=2)
        except SystemExit:
            print('junk after the result')
            sys.exit(0)

    def exit_three(module):
        sys.exit(3)

    def exit_silently(module):
        os._exit(4)

    def exit_zero_silently(module):
        os._exit(0)

    def exit_after_output(module):
        sys.stdout.write('{"changed": true, "answer": 5}')
        sys.stdout.flush()
        os._exit(0)

    def half_a_result(module):
        sys.stdout.write('{"changed": tr')
        sys.exit(0)

    def killed(module):
        os.kill(os.getpid(), signal.SIGKILL)

    def writes_stderr(module):
        sys.stderr.write('a line on stderr\\n')
        os.write(2, b'another line\\n')
        module.exit_json(changed=False)

    def fails(module):
        module.fail_json(msg='failed on purpose', extra=[1, 2])

    def warns(module):
        module.warn('be warned')
        module.deprecate('be gone', version='9.0', collection_name='ns.col')
        module.exit_json(changed=False)

    def child_keeps_stdout(module):
        if os.fork() == 0:
            os.setsid()
            import time
            time.sleep(1)
            os._exit(0)
        module.exit_json(changed=False)

    def big(module):
        module.exit_json(changed=False, big='x' * 3000000, end='end')

    def unicode(module):
        module.exit_json(changed=False, text=u'caf\\u00e9 \\u2603 \\U0001f600')

    def main_is_a_module(module):
        me = sys.modules['__main__']
        module.exit_json(changed=False, name=__name__, thing=me.Thing is Thing,
                         pickled=type(pickle.loads(pickle.dumps(Thing()))).__name__)

    def stdin_ends(module):
        module.exit_json(changed=False, read=len(os.read(0, 100)) if not os.isatty(0) else 0)

    def surroundings(module):
        mask = os.umask(0)
        os.umask(mask)
        handlers = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)]
        module.exit_json(changed=False, cwd=os.getcwd(), mask=mask, threads=threading.active_count(),
                         home=os.environ.get('HOME'), path=os.environ.get('PATH'), lang=os.environ.get('LANG'),
                         user=os.environ.get('USER'), probe=os.environ.get('PROBE'), handlers=handlers,
                         ids=[os.getuid(), os.geteuid(), os.getgid(), sorted(os.getgroups())],
                         argv=len(sys.argv), python=sys.executable, flags=str(sys.flags))

    def soils(module):
        os.environ['PROBE'] = 'soiled'
        os.umask(0o777)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        import ansible.module_utils.basic as basic
        basic.soiled = True
        sys.path.insert(0, '/soiled')
        module.exit_json(changed=False, cwd=os.getcwd())

    def is_clean(module):
        import ansible.module_utils.basic as basic
        mask = os.umask(0)
        os.umask(mask)
        module.exit_json(changed=False, probe=os.environ.get('PROBE'), mask=mask, soiled=hasattr(basic, 'soiled'),
                         path='/soiled' in sys.path, term=str(signal.getsignal(signal.SIGTERM)))

    def tmpdir(module):
        path = os.path.join(module.tmpdir, 'file')
        open(path, 'w').close()
        module.add_cleanup_file(path)
        module.exit_json(changed=False, exists=os.path.exists(path), private=oct(os.stat(module.tmpdir).st_mode)[-3:])

    def runs_commands(module):
        rc, out, err = module.run_command('cat; echo err >&2; exit 7', use_unsafe_shell=True, data='fed')
        big = module.run_command(['head', '-c', '300000', '/dev/zero'])
        world = 'umask; ulimit -n; grep SigIgn /proc/$$/status | tail -c 5'     # of the C library's own it is no matter
        module.exit_json(changed=False, got=[rc, out, err], big=len(big[1]), worlds=[
            module.run_command(world, use_unsafe_shell=True, umask=mask)[1] for mask in (None, 0o27)])

    def reads_itself(module):
        import ansible.module_utils
        names = [n for n in sys.modules if n.startswith('ansible.module_utils.') and sys.modules[n]]
        module.exit_json(changed=False, has_basic='ansible.module_utils.basic' in names)

    def multiprocess(module):
        r, w = os.pipe()
        if os.fork() == 0:
            os.write(w, b'from a child')
            os._exit(0)
        os.close(w)
        data = os.read(r, 100).decode()
        os.wait()
        module.exit_json(changed=False, data=data)

    def main():
        module = AnsibleModule({'do': {'type': 'str', 'required': True}, 'secret': {'no_log': True}},
                               supports_check_mode=True)
        globals()[module.params['do']](module)

    if __name__ == '__main__':
        main()
    '''

RESPAWN = '''
    #!/usr/bin/python
    from __future__ import absolute_import, division, print_function
    import os, sys
    from ansible.module_utils.basic import AnsibleModule
    from ansible.module_utils.common.respawn import has_respawned, probe_interpreters_for_module, respawn_module
    def main():
        module = AnsibleModule({'where': {'type': 'str'}, 'n': {'type': 'int'}})
        if not has_respawned():
            assert not probe_interpreters_for_module([module.params['where']], 'no_such_library')
            respawn_module(probe_interpreters_for_module(['/nonexistent', module.params['where']], 'json'))
        module.exit_json(changed=False, respawned=has_respawned(), python=sys.executable, n=module.params['n'],
                         main=__name__)
    if __name__ == '__main__':
        main()
    '''

COLLECTION = {
    'collections/ansible_collections/ns/col/plugins/modules/hi.py': '''
        #!/usr/bin/python
        from ansible.module_utils.basic import AnsibleModule
        from ansible_collections.ns.col.plugins.module_utils.words import greet
        from ..module_utils.deep.er import depth
        module = AnsibleModule({'name': {'type': 'str'}})
        module.exit_json(changed=False, said=greet(module.params['name']), depth=depth())
        ''',
    'collections/ansible_collections/ns/col/plugins/module_utils/words.py':
        'from .deep.er import depth\ndef greet(name):\n    return "hi %s %d" % (name, depth())\n',
    'collections/ansible_collections/ns/col/plugins/module_utils/deep/__init__.py': '',
    'collections/ansible_collections/ns/col/plugins/module_utils/deep/er.py': 'def depth():\n    return 2\n',
    'collections/ansible_collections/ns/col/plugins/action/acts.py': '''
        from ansible.plugins.action import ActionBase
        class ActionModule(ActionBase):
            def run(self, tmp=None, task_vars=None):
                result = super().run(tmp, task_vars)
                first = self._execute_module('ns.col.hi', {'name': 'from action'}, task_vars=task_vars)
                second = self._low_level_execute_command('echo low level; echo err >&2; exit 5')
                exists = self._remote_file_exists('/etc/hostname')
                result.update(first=first['said'], second=[second['rc'], second['stdout'].strip()], exists=exists)
                return result
        ''',
    'collections/ansible_collections/ns/col/plugins/filter/f.py':
        'class FilterModule:\n    def filters(self):\n        return {"twice": lambda text: text * 2}\n',
    'collections/ansible_collections/ns/col/roles/r/tasks/main.yml': '- name: in the role\n  hi: {name: role}\n',
}


def tasks(*lines):
    """A play on all hosts of one-line tasks."""
    return '- hosts: all\n  gather_facts: false\n  tasks:\n' + ''.join('    - %s\n' % line for line in lines)


def probe(*deeds, extra=''):
    return tasks(*['{name: %s, probe: {do: %s}, ignore_errors: true%s}' % (deed, deed, extra) for deed in deeds])


OBSERVES = '''
    #!/usr/bin/python
    import gc, locale, os, resource, signal, socket, stat, sys, threading, time, warnings
    from ansible.module_utils.basic import AnsibleModule

    def told(function, *args):
        try:
            return function(*args)
        except OSError as e:
            return str(e)

    with open('/proc/self/status') as file:
        status = dict(line.split(':\\t') for line in file.read().splitlines())
    facts = dict(
        arguments=len(sys.argv), name=__name__, package=__package__, globals=sorted(n for n in globals() if n[:1] == '_'),
        is_main=vars(sys.modules['__main__']) is globals(), path=sys.path[1:], first=sys.path[0] in __file__,
        flags=str(sys.flags), encodings=[sys.getfilesystemencoding(), sys.stdin.encoding, sys.stdout.encoding,
                                         sys.stdout.errors], locale=locale.setlocale(locale.LC_ALL),
        python=[sys.executable, sys.version, sys.dont_write_bytecode, sys.getrecursionlimit(), gc.isenabled(),
                gc.get_threshold(), sys.gettrace(), sys.getprofile(), sys.excepthook is sys.__excepthook__,
                [str(each) for each in warnings.filters], socket.getdefaulttimeout(), threading.active_count()],
        environment=dict(os.environ), zone=time.tzname, cwd=os.getcwd(), mask=os.umask(0o22),
        ids=[os.getresuid(), os.getresgid(), sorted(os.getgroups())], priority=os.nice(0),
        limits=[resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name[:7] == 'RLIMIT_'],
        signals=[str(signal.getsignal(n)) for n in range(1, 32)],
        blocked=[status[name] for name in ('SigBlk', 'SigIgn', 'SigCgt', 'CapEff', 'CapInh', 'CapAmb', 'NoNewPrivs')],
        terminals=[os.isatty(n) for n in range(3)], tty=told(open, '/dev/tty'), input=sys.stdin.read(),
        files=[name for name in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + name)])
    module = AnsibleModule({})
    facts.update(tmpdir=[os.path.dirname(module.tmpdir), os.stat(module.tmpdir).st_mode], shell=module.run_command(
        'cat; tty; umask; ulimit -a; trap; ls /proc/self/fd; env | cut -d= -f1 | sort', use_unsafe_shell=True))
    # Each run has another value of these.
    for name in ('SSH_CLIENT', 'SSH_CONNECTION', 'SUDO_COMMAND'):
        facts['environment'][name] = name in facts['environment']
    module.exit_json(facts=facts)
'''


# Of Ansible's own plugins, by their short and by their full names: the same, whichever comes first.
FULL_NAMES = '''
import sys
from ansible.plugins.loader import action_loader, connection_loader, init_plugin_loader
init_plugin_loader([])
import mitogen_single as ms

actions = 'command shell copy template fetch stat file slurp ping set_fact debug'.split()
for name in [prefix + name for prefix in sys.argv[1:] for name in actions]:
    short = 'ansible.plugins.action.' + name.rpartition('.')[2]
    assert ms.action_module(name, ()) in (short, 'ansible.plugins.action.normal'), ms.action_module(name, ())
    assert ms.action_module(name, ()) in ms.REVIEWED, name
for name in [prefix + name for prefix in sys.argv[1:] for name in ('ssh', 'local')]:
    assert ms.connection_module(name) in ms.REVIEWED, name
    assert name[-3:] != 'ssh' or connection_loader.get(name, class_only=True) is ms.ssh_plugin.Connection
for name in ('copy', 'fetch'):
    assert sys.modules[action_loader.get('ansible.builtin.' + name, class_only=True).__module__] is (
        ms.copy_action if name == 'copy' else ms.fetch_action)
print('same')
'''


class RealModules(Real):
    every_core = OLDEST_CORE
    pipelining = True

    def test_well_behaved(self):
        self.compare(probe(
            'junk_before', 'exit_after_output', 'fails', 'warns', 'unicode', 'main_is_a_module',
            'stdin_ends', 'tmpdir', 'runs_commands', 'reads_itself', 'multiprocess', 'big'),
            files={'library/probe.py': PROBE}, pipelining=True, logins={LAB.login: 1})

    def test_one_module_does_not_soil_the_next(self):
        stock, ours = self.compare(probe('soils', 'is_clean', 'soils', 'is_clean'),
                                   files={'library/probe.py': PROBE}, pipelining=True)
        self.assertEqual(ours.result('is_clean')['soiled'], False)

    def test_modules_that_follow_each_other_in_one_process(self):
        """What one of them was told or did is nothing to the next one."""
        path = self.out + '/file'
        lines = ['{name: directory, file: {path: %s, state: directory}}' % self.out,
                 '{name: there, command: pwd, args: {chdir: /usr}}', '{name: here, command: pwd}',
                 '{name: given, shell: "echo [$GIVEN $LC_ALL]", environment: {GIVEN: one, LC_ALL: C}}',
                 '{name: not given, shell: "echo [$GIVEN $LC_ALL]"}',
                 '{name: warned, command: echo, args: {executable: /bin/sh}}', '{name: not warned, command: echo}',
                 '{name: secret, command: echo secret, no_log: true}',
                 '{name: fails, command: "false", ignore_errors: true}',
                 '{name: crashes, ping: {data: crash}, ignore_errors: true}', '{name: alive, ping: {}}',
                 '{name: bad, file: {path: %s, state: nonsense}, ignore_errors: true}' % path,
                 '{name: no, command: "no-such-program", ignore_errors: true}',
                 '{name: is there, command: echo, args: {creates: /etc/passwd}}',
                 '{name: file, copy: {content: "{{ item }}", dest: %s}, loop: [a, b, b]}' % path,
                 '{name: line, lineinfile: {path: %s, line: "{{ item }}"}, loop: [a, b, a]}' % path,
                 '{name: block, blockinfile: {path: %s, block: "{{ item }}"}, loop: [a, b, b]}' % path,
                 '{name: other, replace: {path: %s, regexp: "{{ item }}", replace: c}, loop: [a, b, x]}' % path,
                 '{name: mode, file: {path: %s, mode: "{{ item }}"}, loop: ["0600", "0640", "0640"]}' % path,
                 '{name: seen, stat: {path: "{{ item }}"}, loop: [%s, /etc/passwd, /nonexistent]}' % path,
                 '{name: read, slurp: {path: "{{ item }}"}, loop: [%s, /etc/passwd, /etc/passwd]}' % path]
        self.compare(tasks(*lines), pipelining=True, without=('exception', 'module_stderr'))
        pids = '{name: pids, shell: "echo $PPID", loop: "{{ range(9) | list }}"%s}'
        play = self.run_ours(tasks('command: echo warm', pids % '',
                                   pids.replace('pids', 'each') % ', vars: {mitogen_task_isolation: fork}'))
        for name, processes in (('pids', 1), ('each', 9)):
            found = {item['stdout'] for item in play.result(name)['results']}
            self.assertEqual(len(found), processes if self.ours else 9, name)

    def test_surroundings(self):
        """Of its process, its interpreter and its surroundings: with and without become, limits and an environment."""
        variables = ('A: "b  c"', 'PYTHONPATH: /usr/games, PYTHONWARNINGS: ignore', 'LC_ALL: C', 'LANG: C', 'TZ: Asia/Tokyo',
                     'HOME: %s, LD_LIBRARY_PATH: /usr/games' % self.out, 'LC_CTYPE: none.such', 'PYTHONIOENCODING: latin1')
        book = tasks('{name: login, observes: {}}', *['{name: root, observes: {}, become: true}'] * ROOT,
                     '{name: limited, observes: {}, vars: {ansible_python_module_rlimit_nofile: 777}}',
                     *['{name: "%s", observes: {}, environment: {%s}}' % (given.replace('"', ''), given)
                       for given in variables])
        self.compare(book, files={'library/observes.py': textwrap.dedent(OBSERVES).lstrip()}, pipelining=True)

    def test_misbehaving(self):
        deeds = ('crash', 'exit_three', 'exit_silently', 'exit_zero_silently', 'half_a_result', 'killed',
                 'writes_stderr', 'crash_in_module_utils', 'junk_after', 'child_keeps_stdout')
        stock, ours = self.compare(probe(*deeds), files={'library/probe.py': PROBE}, pipelining=True,
                                   without=('exception', 'module_stderr', 'module_stdout',
                                            'rc', 'msg', 'warnings'))
        told = ours.result('crash')
        self.assertIn('crashed on purpose', str(told))
        self.assertEqual(stock.result('exit_three').get('rc'), ours.result('exit_three').get('rc'))

    def test_crashes_say_what_stock_says(self):
        stock, ours = self.compare(probe('crash', 'exit_three', 'fails', 'writes_stderr'),
                                   pipelining=True,
                                   files={'library/probe.py': PROBE},
                                   without=('exception', 'module_stderr'))
        self.assertEqual(stock.result('crash').get('module_stderr', '').splitlines()[-1:],
                         ours.result('crash').get('module_stderr', '').splitlines()[-1:])
        self.assertEqual(ours.result('crash').get('exception') is None,
                         stock.result('crash').get('exception') is None)

    def test_respawn(self):
        where = LAB.path('python-other')
        if not os.path.lexists(where):
            os.symlink('/usr/bin/python3', where)
        self.compare(tasks('respawn: {where: %s, n: 1}' % where, 'respawn: {where: %s, n: 2}' % where),
                     files={'library/respawn.py': RESPAWN}, pipelining=True)

    def test_another_interpreter_for_one_task(self):
        other = LAB.path('python-link')
        if not os.path.lexists(other):
            os.symlink('/usr/bin/python3', other)
        lines = ['{name: a, probe: {do: surroundings}}',
                 '{name: b, probe: {do: surroundings}, vars: {ansible_python_interpreter: %s}}' % other,
                 '{name: c, probe: {do: surroundings}}']
        self.compare(tasks(*lines), files={'library/probe.py': PROBE}, pipelining=True,
                     without=('argv',))

    def test_interpreter_discovery(self):
        for mode in ('auto', 'auto_silent', None):
            with self.subTest(mode=mode):
                self.compare('- hosts: all\n  tasks:\n    - {probe: {do: reads_itself}}\n    - debug: {var: ansible_facts.python}\n'
                             '    - debug: {var: ansible_facts.discovered_interpreter_python}\n',
                             pipelining=True,
                             files={'library/probe.py': PROBE},
                             hosts={'t1': {'ansible_python_interpreter': mode}})

    @newest
    def test_no_log(self):
        stock, ours = self.compare(tasks(
            '{name: hidden, command: echo tell-nobody, no_log: true}',
            '{name: hidden loop, command: "echo tell-nobody {{ item }}", loop: [1, 2], no_log: true}',
            '{name: argument, probe: {do: unicode, secret: tell-nobody}}',
            '{name: shown, command: echo done}'), files={'library/probe.py': PROBE}, args=['-vvv'],
                                   pipelining=True)
        self.assertNotIn('tell-nobody', json.dumps(ours.result('hidden')))
        self.assertNotIn('tell-nobody', ours.out.split('TASK [shown]')[0].split('TASK [argument]')[-1])

    def test_check_and_diff(self):
        book = tasks(
            '{file: {path: OUT, state: directory}, check_mode: false}',
            '{copy: {content: "one\\n", dest: OUT/a}}',
            '{copy: {content: "two\\n", dest: OUT/b}, check_mode: false}',
            '{copy: {content: "three\\n", dest: OUT/b}}', '{lineinfile: {path: OUT/b, line: more}}',
            '{file: {path: OUT/b, mode: "0600"}}', '{command: echo never}',
            '{command: echo yes, check_mode: false}',
            '{template: {src: t.j2, dest: OUT/b}}').replace('OUT', self.out)
        files = {'templates/t.j2': 'four {{ ansible_check_mode }}\n'}
        self.compare(book, files=files, args=['--check', '--diff'])
        self.compare(book, files=files, args=['--diff'])

    def test_keep_remote_files(self):
        self.needs_root()
        counts = []
        for engine in (self.stock, self.plugin):
            play = self.new(engine, tasks('{name: kept, stat: {path: /etc/hostname}}'),
                            env={'ANSIBLE_KEEP_REMOTE_FILES': '1'}).run()
            self.assertEqual(play.rc, 0, play.tail())
            kept = glob.glob('/home/mslab/.ansible/tmp/ansible-tmp-*/AnsiballZ_stat.py')
            counts.append(len(kept))
            self.remove_control(play)
            shutil.rmtree('/home/mslab/.ansible', ignore_errors=True)
        self.assertEqual(counts, [1, 1])

    def test_collections(self):
        book = tasks('{name: full, ns.col.hi: {name: full}}', '{name: acts, ns.col.acts: {}}',
                     'debug: {msg: "{{ \'ab\' | ns.col.twice }}"}') + '''
- hosts: all
  gather_facts: false
  collections: [ns.col]
  tasks:
    - {name: short, hi: {name: short}}
    - import_role: {name: r}
    - {name: builtin, ansible.builtin.command: echo builtin}
    - {name: legacy, ansible.legacy.stat: {path: /etc/hostname}}
'''
        self.compare(book, files=COLLECTION, logins={LAB.login: 1})

    def test_module_utils_override(self):
        """A play may put its own module_utils in the place of Ansible's."""
        module = '''
            #!/usr/bin/python
            from ansible.module_utils.basic import AnsibleModule
            from ansible.module_utils.facts.timeout import DEFAULT_GATHER_TIMEOUT
            from ansible.module_utils import extra
            module = AnsibleModule({})
            module.exit_json(changed=False, timeout=DEFAULT_GATHER_TIMEOUT, word=extra.WORD)
            '''
        self.compare(tasks('shadow:'), files={
            'library/shadow.py': module, 'module_utils/extra.py': 'WORD = "play"\n'})
        stock, ours = self.compare(tasks('shadow:'), files={
            'library/shadow.py': module, 'module_utils/extra.py': 'WORD = "changed"\n'})
        self.assertEqual(ours.result('shadow')['word'], 'changed')

    def test_full_names(self):
        python = os.path.join(venv(self.core), 'bin', 'python')
        for prefixes in (['ansible.builtin.', ''], ['', 'ansible.builtin.'], ['ansible.legacy.', 'ansible.builtin.', '']):
            self.assertEqual(sh(python, '-B', '-c', FULL_NAMES, *prefixes, cwd=HERE), 'same\n')

    @newest
    def test_connection_by_full_name(self):
        self.compare(WHO, hosts={'t1': {'ansible_connection': 'ansible.builtin.ssh'}},
                     logins={LAB.login: 1})

    @newest
    def test_many_different_modules(self):
        self.compare(THIRTEEN, files={'templates/t.j2': 'x\n'}, without=('ansible_facts', 'diff'))


THIRTEEN = tasks(
    'setup:', 'stat: {path: /etc/hostname}', 'file: {path: "{{ base }}", state: directory}',
    'copy: {content: "a\\nb\\n", dest: "{{ base }}/f"}', 'lineinfile: {path: "{{ base }}/f", line: c}',
    'replace: {path: "{{ base }}/f", regexp: b, replace: d}',
    'blockinfile: {path: "{{ base }}/f", block: e}',
    'slurp: {src: "{{ base }}/f"}', 'find: {paths: "{{ base }}"}', 'getent: {database: passwd}',
    'command: hostname', 'service_facts:', 'package_facts:').replace(
        '  tasks:\n', '  vars: {base: "/tmp/mitogen_single_test_{{ ansible_user }}"}\n  tasks:\n') + \
    '    - file: {path: "{{ base }}", state: absent}\n'


# What Ansible found for a module is kept on the controller.  All of it lies in one directory, so that runs have the
# same paths; the module tells what it was built from.

TELLS = '''
    #!/usr/bin/python
    import ansible
    from ansible.module_utils.basic import AnsibleModule
    from ansible.module_utils.common import network
    from ansible.module_utils.extra import WORD
    from ansible_collections.ns.col.plugins.module_utils.words import WORD as COLLECTED
    try:
        from ansible_collections.ns.late.plugins.module_utils.words import WORD as LATE
    except ImportError:
        LATE = None
    AnsibleModule({}).exit_json(changed=False, marker=getattr(ansible, "marker", None), core=ansible.__version__,
                                words=["module", WORD, getattr(network, "WORD", "own"), COLLECTED, LATE])
    '''


class RealCache(Real):
    every_core = OLDEST_CORE

    def setUp(self):
        super().setUp()
        self.root = tempfile.mkdtemp(dir=LAB.path('.'))
        self.home = os.path.join(self.root, 'home')
        self.cache = os.path.join(self.home, '.ansible', 'mitogen_single_cache')
        self.write('library/tells.py', textwrap.dedent(TELLS).lstrip())
        self.write('second/extra.py', 'WORD = "extra"\n')
        self.write('second/more.py', 'WORD = "more"\n')
        self.write('second/most.py', 'WORD = "most"\n')
        self.write('c2/ansible_collections/ns/col/plugins/module_utils/words.py', 'WORD = "col"\n')

    def tearDown(self):
        super().tearDown()
        shutil.rmtree(self.root)

    def write(self, name, text, times=None):
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w') as file:
            file.write(text)
        if times:
            os.utime(path, ns=times)

    def start(self, engine, book=tasks('tells:'), **env):
        places = {'ANSIBLE_LIBRARY': 'library', 'ANSIBLE_MODULE_UTILS': 'first:second',
                  'ANSIBLE_COLLECTIONS_PATH': 'c1:c2'}
        env.update({name: ':'.join(os.path.join(self.root, part) for part in value.split(':'))
                    for name, value in places.items()})
        return self.new(engine, book, env=env, home=self.home, hosts={'t1': {'ansible_connection': 'local'}}).start()

    def told(self, engine=None, **options):
        play = self.start(engine or self.plugin, **options).finish()
        self.assertEqual(play.rc, 0, play.tail())
        return play.result('tells')

    def entries(self):
        return sorted(glob.glob(os.path.join(self.cache, '*')))

    def mark(self):
        """What comes from the cache says so."""
        for path in self.entries():
            with open(path) as file:
                entry = json.load(file)
            entry['members']['ansible/__init__.py'][1] += 'marker = "from the cache"\n'
            with open(path, 'w') as file:
                json.dump(entry, file)

    def test_is_never_stale(self):
        words = ['module', 'extra', 'own', 'col', None]

        def step(*changes):
            for at, word in changes:
                words[at] = word
            for engine in (self.plugin, self.stock)[:1 + (self.core == NEWEST)]:
                self.assertEqual(self.told(engine)['words'], words, (engine.name, changes))

        step()
        if self.ours:
            self.mark()
            self.assertEqual(self.told()['marker'], 'from the cache')
        with open(os.path.join(self.root, 'library/tells.py')) as file:
            self.write('library/tells.py', file.read().replace('"module"', 'MORE').replace(
                'import ansible\n', 'import ansible\nfrom ansible.module_utils.more import WORD as MORE\n'))
        step((0, 'more'))
        before = os.stat(os.path.join(self.root, 'second/extra.py'))
        self.write('second/extra.py', 'from ansible.module_utils.most import WORD\n',
                   (before.st_atime_ns, before.st_mtime_ns))
        step((1, 'most'))
        self.write('first/extra.py', 'WORD = "shadow"\n')
        self.write('first/common/network.py', 'WORD = "nested"\n')
        step((1, 'shadow'), (2, 'nested'))
        shutil.rmtree(os.path.join(self.root, 'first'))
        self.write('first/extra/__init__.py', 'WORD = "package"\n')
        step((1, 'package'), (2, 'own'))
        self.write('c2/ansible_collections/ns/col/plugins/module_utils/words.py', 'WORD = "new"\n')
        self.write('c2/ansible_collections/ns/late/plugins/module_utils/words.py', 'WORD = "late"\n')
        step((3, 'new'), (4, 'late'))
        self.write('c2/ansible_collections/ns/col/meta/runtime.yml', 'plugin_routing: {module_utils: {words: {'
                   'redirect: ansible_collections.ns.late.plugins.module_utils.words}}}\n')
        step((3, 'late'))
        self.write('c1/ansible_collections/ns/col/plugins/module_utils/words.py', 'WORD = "moved"\n')
        step((3, 'moved'))

    @newest
    def test_another_core_at_the_same_place(self):
        installed = sh(os.path.join(self.plugin.venv, 'bin', 'python'), '-c',
                       'import ansible; print(ansible.__path__[0])').strip()
        shutil.copytree(installed, os.path.join(self.root, 'core', 'ansible'))
        for version in ('2.21.77', '2.21.888'):     # of two sizes: Python's own cache tells files by size and second
            self.write('core/ansible/release.py', '__version__ = "%s"\n__author__ = "Ansible, Inc."\n'
                       '__codename__ = "x"\n' % version)
            self.assertEqual(self.told(PYTHONPATH=os.path.join(self.root, 'core'))['core'], version)

    @newest
    def test_is_used_while_it_is_private(self):
        self.needs_plugin()
        self.told()
        self.assertEqual([stat.S_IMODE(os.stat(path).st_mode) for path in [self.cache] + self.entries()],
                         [0o700, 0o600])
        self.mark()
        self.assertEqual(self.told()['marker'], 'from the cache')
        elsewhere, entry = self.cache + '2', self.entries()[0]
        spoils = [
            (lambda: os.chmod(self.cache, 0o750), lambda: os.chmod(self.cache, 0o700)),
            (lambda: (os.rename(self.cache, elsewhere), os.symlink(elsewhere, self.cache)),
             lambda: (os.unlink(self.cache), os.rename(elsewhere, self.cache))),
            (lambda: os.chmod(entry, 0o640), lambda: self.assertEqual(os.stat(entry).st_mode & 0o777, 0o600))]
        if ROOT:
            spoils.insert(0, (lambda: os.chown(self.cache, FIRST_UID, -1), lambda: os.chown(self.cache, 0, -1)))
        for spoil, undo in spoils:
            spoil()
            self.assertIsNone(self.told()['marker'])
            undo()

    @newest
    def test_broken_entries_are_replaced(self):
        self.needs_plugin()
        book = tasks('tells:', 'stat: {path: /}', 'slurp: {src: /etc/hostname}', 'getent: {database: passwd}',
                     'ping:', 'find: {paths: /etc/ssh}')
        self.told(book=book)
        whole = {path: open(path).read() for path in self.entries()}
        self.assertEqual(len(whole), 6)
        broken = ['', '[]', '{"names": 1}', '\0\1', '[' * 100000, next(iter(whole.values()))[:2000]]
        for path, text in zip(whole, broken):
            self.write(path, text)
        self.told(book=book)
        self.assertEqual({path: open(path).read() for path in self.entries()}, whole)

    @newest
    def test_nowhere_to_keep_it(self):
        self.needs_plugin()
        self.write('home/.ansible/mitogen_single_cache', 'a file\n')
        self.told()
        with open(self.cache) as file:
            self.assertEqual(file.read(), 'a file\n')

    @newest
    def test_two_runs_at_once(self):
        self.needs_plugin()
        for play in [self.start(self.plugin) for _ in range(2)]:
            self.assertEqual(play.finish().rc, 0, play.tail())
        self.assertEqual(len(self.entries()), 1)
        self.mark()
        self.assertEqual(self.told()['marker'], 'from the cache')

    @newest
    def test_what_the_search_says_is_said_in_each_run(self):
        self.write('c2/ansible_collections/ns/col/meta/runtime.yml', 'plugin_routing: {module_utils: {words: {'
                   'deprecation: {removal_version: 9.0.0, warning_text: words are going},'
                   'redirect: ansible_collections.ns.col.plugins.module_utils.letters}}}\n')
        self.write('c2/ansible_collections/ns/col/plugins/module_utils/letters.py', 'WORD = "\\d"\n')
        for engine in (self.stock, self.plugin, self.plugin):
            play = self.start(engine, ANSIBLE_DEPRECATION_WARNINGS='1').finish()
            self.assertEqual(play.rc, 0, play.tail())
            for text in 'words are going', 'SyntaxWarning':
                self.assertEqual((play.out + play.err).count(text), 1, play.tail())

    @newest
    def test_sources_travel_behind_an_earlier_request(self):
        """Once to each agent, while an earlier task is at work: those that an earlier run has found."""
        self.needs_plugin()
        book = tasks('command: sleep 0.7', 'stat: {path: /}', 'slurp: {src: /etc/hostname}', 'ping:',
                     '{getent: {database: passwd}, become: true}', '{getent: {database: group}, become: true}',
                     'copy: {content: x, dest: ~/copied}', 'file: {path: ~/copied, state: absent}')
        self.sent(book)
        sent = self.sent(book)
        carried = [(link, blob) for kind, link, what in sent if kind in ('blobs', 'share') for blob in what]
        self.assertEqual([twice for twice, n in collections.Counter(carried).items() if n > 1], [])
        calls = [what for kind, _, what in sent if kind == 'call']
        self.assertEqual(calls, ['command', 'stat', 'slurp', 'ping', 'getent', 'getent', 'stat', 'copy', 'file'])
        story = ' '.join(what if kind == 'call' else kind for kind, _, what in sent)
        self.assertRegex(story, 'blobs command blobs reply stat blobs reply slurp blobs reply ping blobs reply'
                                ' (reply )*share getent (blobs )?share reply getent (blobs )?share reply stat')

    def sent(self, book):
        """What the broker and agents said to each other: (kind, number of the agent, what) of each frame"""
        play = self.new(self.plugin, book, files={'plugins/callback/mslisten.py': LISTENER}, home=self.home,
                        env={'ANSIBLE_CALLBACKS_ENABLED': 'mslisten'}).run()
        self.assertEqual(play.rc, 0, play.tail())
        with open(os.path.join(play.dir, 'sent')) as file:
            return [json.loads(line) for line in file]


# A callback plugin that has the broker write down what it sends, the name of a module or the hashes of sources, and
# when there was an answer.
LISTENER = '''
import json, os, struct, sys
from ansible.plugins.callback import CallbackBase

class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = 'notification'
    CALLBACK_NAME = 'mslisten'
    CALLBACK_NEEDS_ENABLED = True

    def v2_playbook_on_task_start(self, task, is_conditional):
        if not self.disabled:
            self.disabled = True
            listen([module for module in list(sys.modules.values()) if hasattr(module, 'KINDS')][0])

def listen(ms):
    def note(kind, number, what=None):
        with open(os.path.join(os.path.dirname(os.environ['MS_RECORD']), 'sent'), 'a') as file:
            print(json.dumps([ms.KINDS[kind], number, what]), file=file)

    def listening_tell(broker, link, kind, request, payload=b''):
        if kind == ms.CALL and 'fqn' in ms.unpack(payload)[0]:
            note(kind, link.number, ms.unpack(payload)[0]['fqn'].rpartition('.')[2])
        if kind == ms.BLOBS:
            note(kind, link.number, [digest.hex() for digest, _ in ms.unpack_blobs(payload)])
        if kind == ms.SHARE:
            number, = struct.unpack_from('>I', payload)
            note(kind, number, [payload[at:at + 20].hex() for at in range(4, len(payload), 20)])
        tell(broker, link, kind, request, payload)

    def listening_take(broker, stream, kind, node, request, payload):
        if kind == ms.REPLY:
            note(kind, node)
        take(broker, stream, kind, node, request, payload)

    tell, ms.Broker.tell = ms.Broker.tell, listening_tell
    take, ms.Broker.take_frame = ms.Broker.take_frame, listening_take
'''


# 13 STYLES ######################################################################################
# What is not a new-style Python module goes Ansible's own generic way, through our connection.

STYLE_MODULES = {
    'library/oldstyle.py': '''
        #!/usr/bin/python
        import json, sys
        words = open(sys.argv[1]).read()
        print(json.dumps({'changed': True, 'words': 'text=given' in words}))
        ''',
    'library/oldshell.sh': '''
        #!/bin/sh
        . "$1"
        echo "{\\"changed\\": false, \\"text\\": \\"$text\\"}"
        ''',
    'library/wantjson.py': '''
        #!/usr/bin/python
        # WANT_JSON
        import json, sys
        arguments = json.load(open(sys.argv[1]))
        print(json.dumps({'changed': False, 'text': arguments['text']}))
        ''',
    'library/jsonargs.py': '''
        #!/usr/bin/python
        import json
        arguments = json.loads("""<<INCLUDE_ANSIBLE_MODULE_JSON_ARGS>>""")
        print(json.dumps({'changed': False, 'text': arguments['text']}))
        ''',
    'library/oldfails.sh': '#!/bin/sh\necho nothing like json\nexit 9\n',
    # Zero bytes make it a binary for Ansible; the kernel and the shell do not mind them.
    'library/binary': b'#!/bin/sh\necho \'{"changed": false, "binary": "\'$(head -c 1 "$1" | tr "{" o)\'"}\'\nexit 0\n'
                      + bytes(64),
}


SURROUNDINGS = '''#!/usr/bin/python
import atexit, os, sys
from ansible.module_utils.basic import AnsibleModule
module = AnsibleModule({'how': {}})
how = module.params['how']
if how == 'raise':
    raise ValueError('how it ends')
if how == 'words':
    sys.exit('words')
if how == 'nothing':
    print('no JSON')
    sys.exit(0)
if how == 'junk':
    print('in front of it')
    atexit.register(print, 'behind it')
mask = os.umask(0)
with open('/proc/%d/cmdline' % os.getppid()) as file:
    parent = file.read()
module.exit_json(
    how=how, cwd=os.getcwd(), mask=mask, where=os.environ['WHERE'], jobs=os.environ['ANSIBLE_ASYNC_DIR'], stdin=sys.stdin.read(),
    files=os.listdir('/proc/self/fd'), leads=os.getpgrp() == os.getppid(),
    tmpdir=os.path.isdir(module.tmpdir) if how == 'tmpdir' else None, uid=os.getuid(), is_file='async_wrapper' in parent,
    arguments=len(sys.argv), name=__name__)
'''


class RealStyles(Real):
    every_core = OLDEST_CORE

    def test_module_styles(self):
        self.compare(tasks(
            'oldstyle: text=given', 'oldshell: text=given', 'wantjson: {text: given}',
            'jsonargs: {text: given}', 'binary: {text: given}',
            '{oldfails: {text: given}, ignore_errors: true}',
            '{oldshell: text=given, environment: {A: b}}'), files=STYLE_MODULES, logins=None,
            without=('module_stderr', 'module_stdout', 'exception'))

    @newest
    def test_styles_with_become(self):
        self.needs_root()
        self.compare(tasks('oldstyle: text=given', 'binary: {text: given}', 'wantjson: {text: given}'),
                     files=STYLE_MODULES, args=['-b', '--become-user', 'msapp'])

    def test_raw(self):
        self.compare(tasks(
            'raw: id -un', 'raw: "echo out; echo err >&2; exit 3"\n      ignore_errors: true',
            'raw: cat /etc/hostname | tr a-z A-Z', 'raw: "echo \\"$0 x\\" \'single\' `echo tick`"',
            '{raw: "echo $VAR", args: {executable: /bin/bash}, environment: {VAR: "v a r"}}',
            'raw: printf "no newline"'), without=('stderr', 'stderr_lines'))

    def test_raw_without_python(self):
        """A root directory in which there is no Python at all: raw works, modules say why not."""
        self.needs_root()
        hosts = {'t1': {'ansible_user': 'msbare'}}
        self.compare(tasks('raw: hostname', 'raw: ls /',
                           '{raw: "echo again; exit 4", ignore_errors: true}'), hosts=hosts,
                     without=('stderr', 'stderr_lines'))

    def test_module_without_python(self):
        self.needs_root()
        hosts = {'t1': {'ansible_user': 'msbare'}, 't2': {}}
        self.compare_failure(WHO, None, '(?i)python3?: .*(not found|no such file)|interpreter|no python',
                             hosts=hosts)

    @newest
    def test_interpreter_that_is_not_there(self):
        hosts = {'t1': {'ansible_python_interpreter': '/nonexistent/python'}, 't2': {}}
        for book in (WHO, tasks('{name: who, stat: {path: /}, environment: {TZ: Asia/Tokyo}}')):
            stock, ours = self.compare_failure(book, None, '/nonexistent/python', hosts=hosts)
            self.assertEqual(stock.result('who', 't1')['msg'], ours.result('who', 't1')['msg'])
        self.compare(tasks('raw: echo works'), hosts=hosts, without=('stderr', 'stderr_lines'))

    @newest
    def test_interpreter_that_does_not_start(self):
        """A version manager's stand-in for a Python that is not installed is passed over."""
        self.needs_root()
        for name, text in (('.bashrc', 'PATH=~:$PATH\n'), ('python3.14', '#!/bin/sh\ncat; exit 127\n')):
            path = '/home/msapp2/' + name
            with open(path, 'w', opener=lambda *args: os.open(*args, 0o755)) as file:
                file.write(text)
            self.addCleanup(os.unlink, path)
        self.compare(tasks('raw: id -un', 'command: id -un'), hosts={'t1': {'ansible_user': 'msapp2'}},
                     without=('stderr', 'stderr_lines'), logins={'msapp2': 1})

    def test_script(self):
        files = {'s.sh': '#!/bin/sh\necho "$# $1 $(pwd)"; echo err >&2; exit ${2:-0}\n',
                 's.py': '#!/usr/bin/python3\nimport sys\nprint(sys.argv[1:])\n'}
        self.compare(tasks(
            'script: s.sh "one two"', 'script: s.sh a 3\n      ignore_errors: true',
            'script: {cmd: s.sh x, chdir: /}', 'script: {cmd: s.py a b, executable: python3}',
            'script: {cmd: s.sh x, creates: /etc/hostname}'), files=files,
            without=('stderr', 'stderr_lines', 'stdout', 'stdout_lines'))

    @newest
    def test_script_with_become(self):
        self.needs_root()
        self.compare(tasks('script: s.sh'), files={'s.sh': '#!/bin/sh\nid -un\n'},
                     args=['-b', '--become-user', 'msapp'],
                     without=('stderr', 'stderr_lines'))

    @newest
    def test_async(self):
        self.compare(tasks(
            # Slow enough, and asked seldom enough, that both are asked as often.
            '{command: sleep 0.5, async: 30, poll: 3}',
            '{command: /bin/false, async: 30, poll: 2, ignore_errors: true}',
            '{name: start, command: sleep 2.5, async: 30, poll: 0, register: job}',
            '{name: wait, async_status: {jid: "{{ job.ansible_job_id }}"}, register: done, until: done.finished, '
            'retries: 60, delay: 4}',
            '{name: tidy, async_status: {jid: "{{ job.ansible_job_id }}", mode: cleanup}}',
            '{name: too slow, command: sleep 20, async: 1, poll: 1, ignore_errors: true}'),
            # Who asks late enough, on a busy machine, sees the last one killed instead of running.
            without=('attempts', 'retries', 'msg', 'started', 'finished', 'stdout', 'stderr', 'child_pid',
                     'async_result', 'exception', 'stdout_lines', 'stderr_lines'), leftovers=False)

    def test_what_becomes_of_jobs(self):
        """How a job ends, what it finds around it, and that the module has become no file for it."""
        ways = ['well', 'junk', 'nothing', 'raise', 'words', 'tmpdir']
        book = tasks(
            '{name: start, tells: {how: "{{ item }}"}, async: 30, poll: 0, loop: %s, register: jobs}' % json.dumps(ways),
            '{name: start binary, binary: {text: given}, async: 30, poll: 0, register: binary}',
            '{name: start escalated, tells: {how: well}, async: 30, poll: 0, become: true, register: escalated}',
            'command: sleep 4',
            '{name: status, async_status: {jid: "{{ item.ansible_job_id }}"}, loop: "{{ jobs.results + [binary] }}", '
            'loop_control: {label: x}, ignore_errors: true, register: ends}',
            '{name: end escalated, async_status: {jid: "{{ escalated.ansible_job_id }}"}, become: true}',
            '{name: tidy, file: {path: "{{ item }}/jobs", state: absent}, become: true, loop: [OUT, "~root"]}',
            '{name: what is left, find: {paths: ~/.ansible/tmp, file_type: any}}').replace('OUT', self.out)
        files = dict(STYLE_MODULES, **{'library/tells.py': SURROUNDINGS})
        varies = 'ansible_job_id', 'results_file', 'exception', 'item', 'cmd', 'is_file', 'msg', 'stderr', 'stderr_lines', 'invocation', 'leads'
        stock, ours = self.compare(book.replace('  tasks:', '  environment: {WHERE: there}\n  vars: {ansible_async_dir: '
                                                '"{{ ansible_become | default(0) | ternary(\'~root\', \'%s\') }}/jobs"}\n'
                                                '  tasks:' % self.out), files=files, leftovers=False,
                                   pipelining=True, without=varies + ('results', 'start', 'end', 'delta'))
        told = []
        for play, is_file in ((stock, True), (ours, not self.ours)):
            ends = [end for end in play.result('status')['results']]
            self.assertEqual([end.pop('is_file', None) for end in ends[:2]], [is_file] * 2, ends)
            self.assertTrue(is_file or all(end['leads'] for end in ends[:2]), ends)     # in stock by chance
            self.assertIn('how it ends', ends[3].get('msg', '') + ends[3].get('stderr', ''))
            self.assertEqual(ends[4]['stderr'], 'words\n')
            told.append([{key: value for key, value in end.items() if key not in varies} for end in ends])
        self.assertEqual(*told)

    @newest
    def test_async_outlives_the_play(self):
        self.needs_root()
        play = self.run_ours(tasks('{shell: "sleep 3; echo done > /home/mslab/async", async: 30, poll: 0}'), leftovers=False)
        self.assertEqual(play.rc, 0, play.tail())
        wait_for(lambda: os.path.exists('/home/mslab/async'), 8, 'the job did not survive')


# 14 FILES #######################################################################################

def archive():
    """A small tar file, bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, text in (('top/a', b'a\n'), ('top/deep/b', b'bb\n')):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(text), 0o640, 1700000000
            tar.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


FETCHED = r'''
import os, sys
from ansible.utils.hashing import md5, secure_hash
import mitogen_single as ms

def known():
    return sum(file.hashed_by(function.__name__) == function(path) for function in (md5, secure_hash))

path = sys.argv[1]
with ms.FetchedFile(path) as file:
    file.write(b'one')
    file.write(memoryview(b'two'))
counts = [known(), known()]
os.utime(path, (1, 1))
counts.append(known())
os.unlink(path)
print(*counts, sum(file.hashed_by(name) is not None for name in file.HASHES))
'''


class RealFiles(Real):
    every_core = OLDEST_CORE

    def book(self, *lines):
        return tasks('file: {path: OUT, state: directory}', *lines).replace('OUT', self.out)

    def test_copy(self):
        files = {'files/empty': b'', 'files/bin': bytes(range(256)) * 4000,
                 'files/we ird \u00fc$name': 'odd\n',
                 'files/tree/a/b/c': 'deep\n', 'files/tree/x.sh': '#!/bin/sh\n', 'files/tree/d/e': 'e\n'}
        self.compare(self.book(
            'copy: {src: empty, dest: OUT/empty}', 'copy: {src: bin, dest: OUT/bin, mode: "0600"}',
            'copy: {src: bin, dest: OUT/bin, mode: "0600"}',
            'copy: {src: "we ird \u00fc$name", dest: "OUT/we ird \u00fc$name"}',
            'copy: {src: tree, dest: OUT/t1}', 'copy: {src: tree/, dest: OUT/t2, directory_mode: "0711"}',
            'copy: {content: "text {{ 1 + 1 }}\\n", dest: OUT/content}',
            'copy: {content: {a: [1, 2]}, dest: OUT/json}',
            'copy: {src: bin, dest: OUT/sub/dir/}', 'copy: {src: bin, dest: ~/ms-home-file}',
            '{file: {path: ~/ms-home-file, state: absent}}',
            'copy: {content: v, dest: OUT/v, validate: "grep v %s"}',
            '{copy: {content: v, dest: OUT/v, validate: "grep -q z %s", force: true}, when: false}',
            '{copy: {content: w, dest: OUT/v, validate: "grep -q z %s"}, ignore_errors: true}',
            'copy: {src: OUT/bin, dest: OUT/bin2, remote_src: true}',
            'copy: {src: OUT/t1, dest: OUT/t3, remote_src: true}',
            'copy: {content: new, dest: OUT/v, force: false}',
            'copy: {content: newer, dest: OUT/v, backup: true}',
            '{copy: {content: x, dest: /nowhere/at/all}, ignore_errors: true}',
            '{copy: {src: missing, dest: OUT/x}, ignore_errors: true}',
            '{copy: {content: x, dest: /proc/nope}, ignore_errors: true}',
            '{copy: {content: "{{ item }}", dest: "OUT/loop{{ item }}"}, loop: [1, 2, 3]}'), files=files,
            without=('exception',))

    def test_template(self):
        files = {'templates/a.j2': '{% for host in groups.all %}{{ host }}\n{% endfor %}{{ ansible_managed | default("") }}',
                 'templates/bad.j2': '{{ nothing.here }}\n', 'templates/crlf.j2': 'a\nb\n'}
        self.compare(self.book(
            'template: {src: a.j2, dest: OUT/a}',
            'template: {src: a.j2, dest: OUT/a, mode: "0600", backup: true}',
            'template: {src: crlf.j2, dest: OUT/crlf, newline_sequence: "\\r\\n"}',
            '{template: {src: bad.j2, dest: OUT/bad}, ignore_errors: true}',
            '{template: {src: a.j2, dest: "OUT/loop{{ item }}"}, loop: [1, 2]}',
            'template: {src: a.j2, dest: OUT/v, validate: "cat %s"}'), files=files, args=['--diff'],
                     without=('exception',))

    def test_what_is_known_of_a_fetched_file(self):
        """Its hashes, as Ansible would work them out, as long as it is the same file."""
        said = sh(os.path.join(self.plugin.venv, 'bin', 'python'), '-c', FETCHED, LAB.path('fetched'), cwd=HERE)
        self.assertEqual(said, '2 2 0 0\n')

    def test_fetch(self):
        files = {'files/bin': bytes(range(256)) * 4000, 'files/noise': os.urandom(3 << 20),
                 'files/mixed': b'text\n' * 99999 + os.urandom(3 << 20) + b'text\n' * 99999}
        stock, ours = self.compare(self.book(
            'copy: {src: bin, dest: OUT/bin}', 'fetch: {src: OUT/bin, dest: fetched/}',
            '{copy: {src: "{{ item }}", dest: OUT/}, loop: [noise, mixed]}',
            '{fetch: {src: "OUT/{{ item }}", dest: fetched/}, loop: [noise, mixed]}',
            'fetch: {src: OUT/bin, dest: fetched/flat, flat: true}',
            'fetch: {src: OUT/bin, dest: fetched/}',
            '{fetch: {src: OUT/missing, dest: fetched/}, ignore_errors: true}',
            '{fetch: {src: OUT/missing, dest: fetched/, fail_on_missing: false}}',
            '{fetch: {src: OUT, dest: fetched/}, ignore_errors: true}'), files=files)
        self.assertEqual(fetched_files(stock), fetched_files(ours))
        self.assertTrue(fetched_files(ours))

    def test_unarchive_assemble_slurp(self):
        files = {'files/a.tgz': archive(), 'files/parts/1': 'one\n', 'files/parts/2': 'two\n'}
        self.compare(self.book(
            'unarchive: {src: a.tgz, dest: OUT}', 'unarchive: {src: a.tgz, dest: OUT}',
            'copy: {src: a.tgz, dest: OUT/a.tgz}', 'file: {path: OUT/r, state: directory}',
            'unarchive: {src: OUT/a.tgz, dest: OUT/r, remote_src: true, list_files: true}',
            'assemble: {src: parts, dest: OUT/local, remote_src: false}',
            'copy: {src: parts, dest: OUT/}',
            'assemble: {src: OUT/parts, dest: OUT/remote, delimiter: "---"}',
            'slurp: {src: OUT/local}', '{slurp: {src: OUT/none}, ignore_errors: true}'), files=files)

    def test_owners_and_modes(self):
        self.needs_root()
        files = {'files/f': 'f\n'}
        self.compare(self.book(
            'file: {path: OUT, mode: "0777"}',
            '{copy: {src: f, dest: OUT/root, owner: msapp, group: msapp2, mode: "4755"}, become: true}',
            '{copy: {src: f, dest: OUT/app}, become: true, become_user: msapp}',
            '{template: {src: f, dest: OUT/apptpl, mode: "0400"}, become: true, become_user: msapp2}',
            '{fetch: {src: OUT/apptpl, dest: fetched/}, become: true, become_user: msapp2}',
            '{fetch: {src: OUT/apptpl, dest: fetched2/}, ignore_errors: true}',
            '{copy: {src: f, dest: OUT/app}, ignore_errors: true}',
            '{copy: {src: f, dest: OUT/app}, become: true}'),
                     files=dict(files, **{'templates/f': 'tpl\n'}),
            sudos={'root': 1, 'msapp': 1, 'msapp2': 1}, logins={'mslab': 1})

    @newest
    def test_synchronize(self):
        if not collections_path():
            self.skipTest('no ansible.posix: PyPI is out of reach')
        if not shutil.which('rsync'):
            self.skipTest('no rsync on this machine')
        files = {'tree/a': 'a\n', 'tree/b/c': 'c\n', 'tree/x.sh': '#!/bin/sh\n'}
        book = self.book(
            'ansible.posix.synchronize: {src: tree/, dest: OUT/}',
            'ansible.posix.synchronize: {src: tree/, dest: OUT/}',
            'command: echo changed > OUT/a',
            'ansible.posix.synchronize: {mode: pull, src: OUT/, dest: pulled/}')
        self.compare(book, files=files, without=('cmd', 'invocation'), leftovers=False,
                     hosts={'t1': {'ansible_ssh_extra_args': '-o LogLevel=ERROR'}})

    @newest
    def test_a_filetree(self):
        files = {'tree/%d/%02d' % (n % 3, n): 'file %d\n' % n for n in range(12)}
        self.compare(self.book(
            '{copy: {src: "{{ item }}", dest: OUT/}, with_fileglob: "tree/*/*"}'), files=files,
                     pipelining=True)

    @newest
    def test_text_travels_small(self):
        """Unless somebody said what ssh is to compress."""
        self.needs_plugin()
        size = 4 << 20
        book = self.book('copy: {src: text, dest: OUT/text}', 'fetch: {src: OUT/text, dest: fetched/}')
        for arguments, fewest, most in ((None, 0, size / 8), ('-o ControlMaster=no', size, 2 * size)):
            link = Link(0)
            self.run_ours(book, files={'files/text': b'line\n' * (size // 5)}, hosts={'t1': {'ansible_port': link.port}},
                          env={'ANSIBLE_SSH_ARGS': arguments})
            carried = link.close()
            for direction in ('up', 'down'):
                self.assertGreaterEqual(carried[direction], fewest, arguments)
                self.assertLess(carried[direction], most, arguments)
            shutil.rmtree(self.out)

    @newest
    def test_interrupted_copy_leaves_the_old_file(self):
        self.needs_root()
        self.needs_plugin()
        big = LAB.path('big')
        with open(big, 'wb') as file:
            for n in range(64):
                file.write(os.urandom(1 << 20))
        os.mkdir(self.out)
        target = os.path.join(self.out, 'big')
        with open(target, 'w') as file:
            file.write('old\n')
        shutil.chown(self.out, 'mslab')
        shutil.chown(target, 'mslab')
        play = self.new(self.plugin, tasks('copy: {src: %s, dest: %s}' % (big, target))).start()
        time.sleep(1.2)
        kill(play.process.pid)
        play.finish()
        self.assertEqual([line for line in play.left_behind() if not ANSIBLES_OWN.search(line)], [])
        with open(target, 'rb') as file:
            self.assertIn(len(file.read()), (4, 64 << 20))
        os.unlink(big)


class RealMemory(Real):
    """A big file there and back: no process of ours may grow by half of it."""

    SIZE = 128 << 20
    GROWTH = 64 << 10               # KiB

    def setUp(self):
        super().setUp()
        self.big = LAB.path('big')
        with open(self.big, 'wb') as file:
            block = os.urandom(1 << 20)
            for n in range(self.SIZE >> 20):
                file.write(block)

    def tearDown(self):
        super().tearDown()
        if os.path.exists(LAB.path('big')):
            os.unlink(LAB.path('big'))

    def peaks(self, play):
        """{pid: [name, first, peak]} in KiB of resident memory, of every process of the run."""
        seen = {}
        while play.running():
            for pid in play.processes():
                size = int(status_of(pid).get('VmRSS', '0 kB').split()[0])
                name, first, peak = seen.get(pid, (proc(pid, 'cmdline').replace('\0', ' ')[:60], size, 0))
                seen[pid] = (name, first, max(peak, size))
            time.sleep(0.1)
        play.finish()
        return seen

    def test_copy_and_fetch(self):
        small = self.new(self.plugin, self.book(__file__)).start()
        base = max(peak for name, first, peak in self.peaks(small).values())
        play = self.new(self.plugin, self.book(self.big), timeout=600).start()
        seen = self.peaks(play)
        record = [event['event'] for event in play.events()]
        self.assertNotIn('runner_failed', record)
        self.assertEqual(record.count('runner_ok'), 3)
        grown = {pid: facts for pid, facts in seen.items() if facts[2] > base + self.GROWTH}
        self.assertEqual(grown, {}, 'peak for a small file: %d KiB' % base)

    def book(self, source):
        return tasks('file: {path: OUT, state: directory}', 'copy: {src: %s, dest: OUT/big}' % source,
                     'fetch: {src: OUT/big, dest: fetched/big, flat: true}').replace('OUT', self.out)


class RealMemoryOfGigabytes(RealMemory):

    SIZE = 1 << 30

    def setUp(self):
        self.needs_slow('1 GiB there and back')
        super().setUp()


ROUND = '''
- {command: "echo {{ round }}", register: said}
- {set_fact: {"fact_{{ round % 5 }}": "{{ said.stdout }}"}}
- {copy: {content: "{{ round }}", dest: "OUT/{{ inventory_hostname }}"}, diff: true}
- {copy: {content: "always the same", dest: "OUT/{{ inventory_hostname }}-same"}}
- {stat: {path: "OUT/{{ inventory_hostname }}"}, become: true}
- {command: id -un, become: true}
- {shell: "exit {{ round % 3 }}", ignore_errors: true}
- block: [{command: /bin/false}]
  rescue: [{debug: {msg: rescued}}]
- {lineinfile: {path: "OUT/{{ inventory_hostname }}-same", line: "{{ round }}", create: true}}
- {slurp: {src: "OUT/{{ inventory_hostname }}"}}
- {command: "echo {{ item }}", loop: [1, 2, 3]}
- {command: echo skipped, when: round < 0}
- {file: {path: "OUT/{{ inventory_hostname }}-same", mode: "0600"}}
'''


class RealSoak(Real):
    """20,000 results of 20 hosts, with become, files and failures: what is still there has not grown, nor lost anything."""

    ROUNDS = 75
    HOSTS = 20

    def setUp(self):
        self.needs_slow('20,000 tasks')
        super().setUp()

    def test_it_stays_as_it_is(self):
        self.needs_root()
        play = self.new(self.plugin, tasks(
            '{file: {path: OUT, state: directory}, run_once: true}',
            '{include_tasks: round.yml, loop: "{{ range(%d) | list }}", loop_control: {loop_var: round}}' % self.ROUNDS
            ).replace('OUT', self.out), files={'round.yml': ROUND.replace('OUT', self.out)}, hosts=many_hosts(self.HOSTS),
            args=['-f', str(self.HOSTS)], timeout=3000).start()
        samples = []                    # of each second: {pid: (program, KiB, open files)}
        while play.running():
            samples.append({pid: self.look_at(pid) for pid in play.processes() if not is_zombie(pid)})
            self.assertLess(len([pid for pid in play.processes() if is_zombie(pid)]), self.HOSTS)
            time.sleep(1)
        play.finish()
        self.assertEqual((play.rc, play.hung), (0, False), play.tail())
        results = [event for event in play.events() if event['event'].startswith('runner_') and event['result']]
        self.assertGreaterEqual(len(results), 14 * self.ROUNDS * self.HOSTS - self.HOSTS)
        # The first tenth is a warm-up; the last moments are the end of all.
        early, late = samples[len(samples) // 10], samples[-3]
        lasting = sorted(set(early) & set(late))
        for pid in sorted(lasting, key=lambda pid: -late[pid][1])[:4]:
            (name, size, files), (_, later_size, later_files) = early[pid], late[pid]
            note('%s: %d -> %d KiB, %d -> %d files' % (name, size, later_size, files, later_files))
        for pid in lasting:
            with self.subTest(program=early[pid][0]):
                self.assertLess(late[pid][1], early[pid][1] * 1.1 + 2048)
                self.assertLessEqual(late[pid][2], early[pid][2] + 5)
        self.assertGreaterEqual(len(lasting), 2 + 3 * self.HOSTS)      # playbook, broker; of each host ssh, two agents

    def look_at(self, pid):
        size = int(status_of(pid).get('VmRSS', '0 kB').split()[0])
        try:
            files = len(os.listdir('/proc/%d/fd' % pid))
        except OSError:
            files = 0
        return proc(pid, 'cmdline').replace('\0', ' ')[:60], size, files


# 15 CONTROL #####################################################################################

# ansible-vault encrypt_string: the word hidden, by the password secret
VAULTED = '''$ANSIBLE_VAULT;1.1;AES256
65366266333461613866313666376266316432646335356631663664343539353862663261323265
6161613336663765653230613364343862663065653231620a323439643337326463333732313163
65616133613166646234386666346339393837376135643731656334343437336530613639326163
3762316164663733660a633730663131343166636234393332303039323530343162346636333434
3139'''.split()

COUNTER = '''
    #!/usr/bin/python
    from ansible.module_utils.basic import AnsibleModule
    module = AnsibleModule({'count': {'type': 'int'}})
    module.exit_json(ansible_facts={'counted': module.params['count'] + 1}, count=module.params['count'])
'''


OWN_COMMAND = "{name: {} for name in ('_raw_params', '_uses_shell', 'argv', 'chdir', 'creates', 'removes', 'stdin')}"


def who_in_turn(accounts):
    return tasks('{name: who, command: id -un, loop: %s, become: true, become_user: "{{ item }}"}' % accounts)


class RealControl(Real):
    every_core = OLDEST_CORE
    pipelining = True

    @newest
    def test_local(self):
        self.compare('''
            - hosts: localhost
              gather_facts: false
              tasks:
                - {name: here, command: pwd}
                - copy: {content: "x\\n", dest: "{{ playbook_dir }}/x"}
                - slurp: {src: "{{ playbook_dir }}/x"}
                - shell: echo $HOME $PATH
                - setup: {gather_subset: ["!all"]}
            ''', without=('ansible_facts', 'stdout', 'stdout_lines', 'md5sum', 'checksum', 'content'))

    def test_local_by_variable_and_local_action(self):
        hosts = {'t1': {'ansible_connection': 'local'}, 't2': {}}
        self.compare(WHO + '    - local_action: command id -un\n    - {command: id -un, connection: local}\n',
                     hosts=hosts, without=('stdout', 'stdout_lines') if not ROOT else ())

    @newest
    def test_local_become(self):
        self.needs_root()
        self.compare('''
            - hosts: localhost
              gather_facts: false
              become: true
              become_user: msapp
              vars: {ansible_python_interpreter: /usr/bin/python3}      # Ansible's own may be in a home closed to others
              tasks:
                - command: id -un
                - copy: {content: x, dest: /tmp/mitogen_single_test_local}
                - file: {path: /tmp/mitogen_single_test_local, state: absent}
            ''')

    def test_delegation(self):
        book = '''
            - hosts: t1,t2
              gather_facts: false
              tasks:
                - {name: to another, command: echo {{ inventory_hostname }}, delegate_to: t3}
                - {name: to here, command: echo {{ inventory_hostname }}, delegate_to: localhost}
                - {name: in turns, command: echo {{ item }}, delegate_to: "{{ item }}", loop: [t1, t3, localhost]}
                - {name: facts of another, setup: {gather_subset: ["!all"]}, delegate_to: t3, delegate_facts: true, run_once: true}
                - {name: once, command: hostname, run_once: true, delegate_to: t2}
                - {name: copied, copy: {content: "{{ inventory_hostname }}\\n", dest: "OUT{{ inventory_hostname }}"}, delegate_to: t3}
                - {name: fetched back, slurp: {src: "OUT{{ inventory_hostname }}"}, delegate_to: t3}
                - {name: tidy, file: {path: "OUT{{ inventory_hostname }}", state: absent}, delegate_to: t3}
            '''.replace('OUT', '/tmp/mitogen_single_test_').replace(
                'echo {{ inventory_hostname }}',
                '"echo {{ inventory_hostname }}"').replace('echo {{ item }}', '"echo {{ item }}"')
        self.compare(book, hosts=many_hosts(3), logins={LAB.login: 3}, without=('ansible_facts',))

    @newest
    def test_serial_throttle_and_order(self):
        self.compare('''
            - hosts: all
              gather_facts: false
              serial: [1, 2]
              order: reverse_sorted
              tasks:
                - command: "echo {{ ansible_play_batch }}"
                - {command: hostname, throttle: 1}
                - {command: "echo {{ play_hosts | length }}", run_once: true}
            ''', hosts=many_hosts(4), logins={LAB.login: 4})

    @newest
    def test_forks_one(self):
        self.compare(WHO, hosts=many_hosts(3), args=['-f', '1'], logins={LAB.login: 3})

    def test_blocks(self):
        self.compare('''
            - hosts: all
              gather_facts: false
              tasks:
                - block:
                    - {name: maybe, command: "test {{ inventory_hostname }} = t1"}
                    - command: echo reached
                  rescue:
                    - debug: {msg: "{{ ansible_failed_result.rc }}"}
                    - {name: fails again, command: /bin/false, when: inventory_hostname == 't3'}
                  always:
                    - command: echo always
                - command: echo after
            ''', hosts=many_hosts(3), rc=2)

    @newest
    def test_any_errors_fatal_and_max_fail(self):
        for word in ('any_errors_fatal: true', 'max_fail_percentage: 20'):
            with self.subTest(word):
                self.compare('''
                    - hosts: all
                      gather_facts: false
                      %s
                      tasks:
                        - command: "test {{ inventory_hostname }} != t2"
                        - command: echo never
                    ''' % word, hosts=many_hosts(3), rc=2)

    @newest
    def test_handlers(self):
        self.compare('''
            - hosts: all
              gather_facts: false
              handlers:
                - {name: one, command: echo one}
                - {name: two, listen: topic, command: echo two, notify: three}
                - {name: three, shell: echo three}
              tasks:
                - {command: echo a, notify: [topic, one]}
                - {command: echo b, notify: one, changed_when: false}
                - meta: flush_handlers
                - {command: echo c, notify: three}
                - {command: /bin/false, ignore_errors: true, notify: one}
            ''', hosts=many_hosts(2))

    def test_loops(self):
        self.compare('''
            - hosts: all
              gather_facts: false
              tasks:
                - {command: "echo {{ item }}", loop: "{{ range(12) | list }}", register: r}
                - {command: "test {{ item }} -ne 3", loop: [1, 2, 3, 4], ignore_errors: true}
                - {command: "echo {{ item }}", loop: [1, 2, 3], when: item != 2, changed_when: item == 3}
                - {command: "echo {{ item.0 }} {{ item.1 }}", with_nested: [[a, b], [c, d]]}
                - {command: "echo {{ item }}", loop: [], register: nothing}
                - {stat: {path: "{{ item }}"}, loop: [/etc/hostname, /nonexistent], loop_control: {label: x, extended: true}}
                - {command: "echo {{ item }}", loop: [1, 2], register: own, failed_when: own.stdout == '2', ignore_errors: true}
                - {command: "echo {{ item }}", loop: [s, t], no_log: true}
                - {shell: "echo x >> OUT; test $(wc -l < OUT) -ge 3", register: u, until: u.rc == 0, retries: 4, delay: 0}
                - {command: /bin/false, register: v, until: v.rc == 0, retries: 2, delay: 0, ignore_errors: true}
                - {shell: "echo {{ item }} > OUT{{ item }}; cat OUT{{ item }}; rm OUT{{ item }}", loop: [1, 2]}
                - {file: {path: OUT, state: absent}}
                - {include_tasks: inc.yml, loop: [1, 2], loop_control: {loop_var: outer}}
            '''.replace('OUT', '/tmp/mitogen_single_test_loop'), logins={LAB.login: 1},
            files={'inc.yml': '- command: "echo {{ outer }}"\n'}, without=('attempts',))

    def test_loops_run_ahead(self):
        """Items that leave without waiting for each other, and those that must wait: same results, same order."""
        self.compare('''
            - hosts: all
              gather_facts: false
              tasks:
                - {file: {path: OUT, state: directory}}
                - {shell: "echo {{ item }} >> OUT/order", loop: "{{ range(20) | list }}", register: r}
                - {shell: "echo {{ item }} >> OUT/order; exit {{ 1 if item % 7 == 3 else 0 }}",
                   loop: "{{ range(8) | list }}", register: r, ignore_errors: true}
                - {debug: {msg: "{{ r.results | map(attribute='rc') | list }}"}}
                - {shell: "echo {{ n }} >> OUT/order", loop: [1, 2, 3, 4, 5, 6], loop_control: {loop_var: n, label: "<{{ n }}>"},
                   when: n is odd, register: own, changed_when: own.rc == 0 and n > 3, failed_when: own.rc != 0}
                - {shell: "echo {{ (sum.stdout | default('0') | int) + item }}", loop: [1, 2, 3, 4, 5], register: sum}
                - {shell: "echo {{ item }}", loop: [1, 2, 3], register: until2, when: until2.stdout | default('0') != '2'}
                - {counter: {count: "{{ ansible_facts.counted | default(0) }}"}, loop: [1, 2, 3, 4]}
                - {command: "printenv X", loop: [a, b, c, d], environment: {X: "{{ item }}"}}
                - {command: "echo {{ item }}", loop: [s, t, u], no_log: true}
                - {user: {name: "nobody{{ item }}", state: absent}, loop: "{{ range(9) | list }}"}
                - {command: "echo {{ item }}", loop: [1, 2, "{{ nothing }}", 4], ignore_errors: true}
                - {command: "echo {{ item.a }}", loop: [{a: 1}, {b: 2}, {a: 3}], ignore_errors: true}
                - {include_tasks: inc.yml, loop: [1, 2], loop_control: {loop_var: outer}}
        '''.replace('OUT', self.out), logins={LAB.login: 1}, pipelining=True, files={
            'inc.yml': '- command: "echo {{ outer }} {{ item }}"\n  loop: [1, 2, 3]\n', 'library/counter.py': COUNTER})

    @newest
    def test_loop_over_logins(self):
        """Items of a loop share connection objects, and nothing of what these were told for another item."""
        self.compare('''
            - hosts: all
              gather_facts: false
              tasks:
                - {shell: "id -un; echo $0", loop: "{{ range(8) | list }}", ignore_unreachable: true,
                   become: "{{ item % 3 == 1 }}", vars: {ansible_user: "{{ 'nosuch' if item == 4 else 'LOGIN' }}",
                   ansible_shell_executable: "{{ '/bin/sh' if item is odd else '/bin/bash' }}"}}
                - {copy: {content: "{{ item }}", dest: "OUT{{ item }}"}, loop: [1, 2, 3], become: "{{ item is odd }}"}
                - {file: {path: "OUT{{ item }}", state: absent}, loop: [1, 2, 3], become: true}
        '''.replace('OUT', self.out).replace('LOGIN', LAB.login), pipelining=False)

    def test_loop_opens_the_way(self):
        """Items are made ready while their host is being logged in to, finds its interpreter, or cannot be reached."""
        self.compare('''
            - hosts: all
              gather_facts: false
              tasks:
                - {shell: "echo {{ item }} >> OUT{{ inventory_hostname }}", loop: "{{ range(7) | list }}", register: r}
                - {command: "cat OUT{{ inventory_hostname }}"}
                - {command: "echo {{ ansible_facts.discovered_interpreter_python | default('none') }}"}
            - hosts: all
              gather_facts: false
              become: true
              tasks:
                - {command: "echo {{ item }} {{ lookup('pipe', 'echo ' ~ item) }}", loop: [1, 2, 3]}
                - {file: {path: "OUT{{ inventory_hostname }}", state: absent}}
        '''.replace('OUT', self.out), rc=4, pipelining=False, logins={LAB.login: 1}, hosts={
            't1': {}, 't2': {'ansible_python_interpreter': 'auto_silent'}, 't3': {'ansible_port': 1}})

    @newest
    def test_loop_of_a_command_of_the_users_own(self):
        """It goes by the name of Ansible's, but returns facts, which the next item reads."""
        self.compare(tasks('{command: "{{ ansible_facts.counted | default(0) }}", loop: [1, 2, 3, 4]}'),
                     files={'library/command.py': COUNTER.replace("{'count': {'type': 'int'}}", OWN_COMMAND).replace(
                         "module.params['count']", "int(module.params['_raw_params'])")}, logins={LAB.login: 1})

    @newest
    def test_keywords_that_are_templates(self):
        """Most keywords of a task have nothing to be worked out, and Ansible is not asked to; these have."""
        self.compare('''
            - hosts: all
              gather_facts: false
              vars: {yes_: true, no_: "no", two: 2, start: "{{ two }}", login: LOGIN, gate: "{{ ansible_port }}"}
              port: "{{ gate }}"
              remote_user: "{{ login }}"
              become_user: "{{ 'ro' ~ 'ot' }}"
              tasks:
                - {command: id -un, become: "{{ yes_ }}", check_mode: "{{ no_ }}", diff: "{{ yes_ }}"}
                - {command: id -un, become: "{{ no_ }}", throttle: "{{ start }}"}
                - {command: /bin/false, ignore_errors: "{{ yes_ }}", no_log: "{{ yes_ }}", name: "{{ login }} #1"}
                - {command: id -un, become: 1, connection: "{{ 's' ~ 'sh' }}"}
                - {command: /bin/false, register: r, until: r.rc == 0, retries: "{{ two }}", delay: "{{ 0 }}",
                   ignore_errors: true}
                - {command: id -un, loop: [1, 2, 3], loop_control: {label: "{{ two }}", pause: "{{ 0 }}"}}
                - {command: id -un, become: "{{ nothing }}", ignore_errors: true}
                - {command: id -un, ignore_unreachable: "{{ 'perhaps' }}", ignore_errors: true}
                - {command: id -un, become: 2, ignore_errors: true}
        '''.replace('LOGIN', LAB.login), pipelining=True, without=('attempts',))

    @newest
    def test_results_as_shown(self):
        """Callbacks get plain values: of marked texts, secrets, numbers, dates, nested and empty things."""
        self.compare('''
            - hosts: all
              gather_facts: false
              vars:
                odd: [[], {}, null, true, 1.5, 2020-02-02, "x{{ 1 }}", {1: {a: [b, {c: null}]}}, 2020-02-02 10:00:00]
                hidden: !vault |
                    VAULTED
              tasks:
                - {debug: {var: odd}}
                - {debug: {msg: "{{ odd + [hidden] }}"}, loop: "{{ odd }}"}
                - {debug: {msg: "{{ item }}"}, loop: ["{{ hidden }}", {deep: ["{{ hidden }}"]}, 3]}
                - {command: "echo {{ item }}", loop: "{{ [hidden, 1, odd] }}"}
                - {set_fact: {kept: "{{ [hidden, odd] }}", other: "{{ hidden }}"}}
                - {debug: {var: kept}}
                - {debug: {var: hidden}}
                - {include_vars: {file: more.yml}}
        '''.replace('VAULTED', '\n                    '.join(VAULTED)), files={
            'password': 'secret\n', 'more.yml': 'secret: {deep: [!vault "%s"]}\n' % '\\n'.join(VAULTED)},
                     env={'ANSIBLE_VAULT_PASSWORD_FILE': 'password'})

    @newest
    def test_loop_that_reads_its_own_results(self):
        self.compare(tasks('{command: "echo {{ item }}", loop: [1, 2, 3, 4], changed_when: "%s"}' % (
            '_task.loop_result.results | length <= 1')), logins={LAB.login: 1})

    def test_variables_changed_in_place(self):
        """What a template appends is gone with its task."""
        self.compare('''
            - hosts: all
              gather_facts: false
              vars: {mine: [1], deep: {er: [2]}}
              tasks:
                - {debug: {msg: "{{ [mine.append(3), deep.er.append(4), vars['mine'].append(5), mine, deep] }}"}}
                - {debug: {msg: "{{ [mine, deep] }}"}}
                - {command: "echo {{ [mine.append(item), mine] }}", loop: [6, 7, 8]}
                - {debug: {msg: "{{ [mine, deep] }}"}}
        ''', hosts=many_hosts(2), pipelining=True)

    @newest
    def test_loop_over_accounts(self):
        self.needs_root()
        self.compare(tasks('{command: id -un, loop: [root, mslab, msapp, msapp2, root, msapp], become: true, '
                           'become_user: "{{ item }}"}'), pipelining=True, logins={LAB.login: 1},
                     sudos={'root': 1, 'msapp': 1, 'msapp2': 1})

    @newest
    def test_loop_over_more_accounts_than_agents(self):
        """Who was not used for longest goes, and comes again; the agents of all fit where nothing is said."""
        self.needs_root()
        six = ['root', 'msapp', 'msapp2', 'mspass', 'mstty', 'msnoisy']
        options = dict(pipelining=True, logins={LAB.login: 1})
        self.compare(who_in_turn(six * 2), env={'MITOGEN_SINGLE_MAX_AGENTS': '2'}, sudos=dict.fromkeys(six, 2), **options)
        for accounts, variables, sudos in (
                (six * 2, {}, dict.fromkeys(six, 1)),
                (['root', 'msapp', 'root', 'msapp2', 'msapp2', 'root', 'msapp'],
                 {'mitogen_single_max_agents': '{{ 1 + 1 }}'}, {'root': 1, 'msapp': 2, 'msapp2': 1})):
            with self.subTest(accounts=accounts):
                play = self.run_ours(who_in_turn(accounts), hosts={'t1': variables})
                self.assertEqual([item['stdout'] for item in play.result('who')['results']], accounts, play.tail())
                self.assert_counts(play, options['logins'], sudos)

    @newest
    def test_loop_over_a_hundred_accounts(self):
        """There are never more than 20 accounts with agents, the login's not counted."""
        self.needs_root()
        self.needs_slow('100 accounts')
        uids = {'mshundred%02d' % n: FIRST_UID + 100 + n for n in range(100)}
        for name, uid in uids.items():          # the lab takes them away, by their comment
            sh('useradd', '-m', '-s', '/bin/bash', '-c', MARK, '-u', str(uid), name)
        play = self.new(self.plugin, who_in_turn(list(uids)), timeout=300).start()
        most = 0
        while play.running():
            most = max(most, len({uid_of(pid) for pid in play.processes()} & set(uids.values())))
        play.finish()
        self.assertEqual([item.get('stdout', item) for item in play.result('who')['results']], list(uids))
        self.assertIn(most, range(10, 22))      # one is on its way while another one goes
        self.assertEqual(play.left_behind(), [], play.tail())

    @newest
    def test_more_accounts_at_work_than_agents(self):
        """Tasks of several hosts meet on one: nobody waits for an agent, none ends in the middle of a task."""
        self.needs_root()
        hosts = {'t1': {'account': 'root', 'wait': 0}, 't2': {'account': 'msapp', 'wait': 0.7},
                 't3': {'account': 'msapp2', 'wait': 2.4}}
        self.compare('''
            - hosts: all
              gather_facts: false
              become: true
              become_user: "{{ account }}"
              tasks:
                - {shell: "sleep 1; id -un {{ lookup('pipe', 'sleep ' ~ wait) }}", delegate_to: t1, register: tried,
                   until: tried.attempts == 2, delay: 2}
                - {copy: {content: "{{ account }}", dest: ~/x, mode: "0600"}, delegate_to: t1}
                - {file: {path: ~/x, state: absent}, delegate_to: t1}
        ''', pipelining=True, hosts=hosts, env={'MITOGEN_SINGLE_MAX_AGENTS': '1'}, logins={LAB.login: 1},
                     sudos={'root': 1, 'msapp': 1, 'msapp2': 1})

    @newest
    def test_account_that_had_an_agent_is_removed(self):
        """No process of it is in the way of userdel, whether its agent is there or has just been sent away."""
        self.needs_root()
        book = tasks('{user: {name: msleaves, comment: "%s", uid: %d}, become: true}' % (MARK, FIRST_UID + 50),
                     '{command: id -un, become: true, become_user: msleaves}',
                     '{command: id -un, become: true, become_user: msapp}',
                     '{user: {name: msleaves, state: absent, remove: true}, become: true}')
        self.compare(book, pipelining=True, sudos={'root': 1, 'msleaves': 1, 'msapp': 1})
        play = self.run_ours(book, env={'MITOGEN_SINGLE_MAX_AGENTS': '1'})
        self.assertEqual(play.rc, 0, play.tail())
        self.assert_counts(play, None, {'root': 2, 'msleaves': 1, 'msapp': 1})

    @newest
    def test_limit_of_open_files(self):
        """The broker takes what it may have; what it starts has what ansible-playbook has."""
        self.needs_plugin()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
        play = self.run_ours('''
            - hosts: localhost
              gather_facts: false
              tasks:
                - name: above
                  shell: |
                    process=$$
                    while [ $process -ne %d ]; do
                        awk '/open files/ {print $4}' /proc/$process/limits
                        process=$(awk '/PPid/ {print $2}' /proc/$process/status)
                    done
        ''' % os.getpid())
        *below, broker, playbook = map(int, play.result('above')['stdout_lines'])
        self.assertEqual((set(below), broker, playbook), ({500}, hard, 500), play.tail())

    @newest
    def test_loop_whose_agent_dies(self):
        """What was not confirmed is unreachable, what is reported as done was done, in order; the rest goes on."""
        self.needs_plugin()
        play = self.run_ours(tasks(
            '{file: {path: OUT, state: directory}}',
            '{name: loop, shell: "echo {{ item }} >> OUT/done; test {{ item }} -ne 5 || '
            'kill -9 $(awk \'/PPid/{print $2}\' /proc/$PPID/status)", loop: "{{ range(40) | list }}", ignore_unreachable: true}',
            '{name: done, command: cat OUT/done}').replace('OUT', self.out), hosts={'t1': {}})
        items = [event['result'] for event in play.events() if event['event'].startswith('item_')]
        self.assertEqual([item['item'] for item in items], list(range(40)))
        done = [int(line) for line in play.result('done')['stdout_lines']]
        self.assertEqual(done, sorted(set(done)), play.tail())
        lost = [item['item'] for item in items if item.get('unreachable')]
        self.assertEqual(lost, list(range(5, 5 + len(lost))))
        self.assertIn(5, lost)
        self.assertEqual([n for n in range(40) if n not in lost or n == 5], done)

    @newest
    def test_results_larger_than_a_pipe(self):
        """Workers tell their results through a pipe, to a thread that may have to wait for them."""
        self.compare(tasks('{command: "echo {{ \'x\' * 8000 }} {{ item }}", loop: "{{ range(12) | list }}"}',
                           '{debug: {msg: "{{ \'x\' * 100000 }}"}}'), hosts=many_hosts(2), pipelining=True)

    @newest
    def test_workers_speak_while_they_build_the_same_module(self):
        """Ansible's module builder holds a lock; whoever waits for it must not keep the holder from its work."""
        self.compare(tasks('find: {paths: /nonexistent}', 'getent: {database: passwd, key: root}'),
                     hosts=many_hosts(5), args=['-vvvvv'], pipelining=True)

    @newest
    def test_callback_with_a_thread_that_prints(self):
        """Whatever is forked while it prints must not wait for the lock that it has."""
        spews = '''
            import os, sys, threading
            from ansible.plugins.callback import CallbackBase

            class CallbackModule(CallbackBase):
                CALLBACK_VERSION, CALLBACK_NAME = 2.0, 'spews'

                def v2_playbook_on_start(self, playbook):
                    os.register_at_fork(after_in_child=lambda: print('child', flush=True))
                    self.thread = threading.Thread(target=self.spew, daemon=True)
                    self.is_over = False
                    self.thread.start()

                def spew(self):
                    while not self.is_over:
                        sys.stdout.write('.')
                        sys.stdout.flush()

                def v2_playbook_on_stats(self, stats):
                    self.is_over = True
                    self.thread.join()
            '''
        play = self.run_ours(WHO, hosts=many_hosts(2), files={'plugins/callback/spews.py': spews}, timeout=40,
                             env={'ANSIBLE_CALLBACKS_ENABLED': 'msrecord,spews'})
        self.assertEqual(play.rc, 0, play.tail())

    def test_reset_and_wait_for_connection(self):
        self.compare('''
            - hosts: all
              gather_facts: false
              tasks:
                - command: echo before
                - meta: reset_connection
                - command: echo after
                - wait_for_connection: {timeout: 20}
                - ping:
            ''', without=('elapsed',))

    def test_reset_reads_groups_again(self):
        """What reset_connection is for: a session that started before a change does not see it."""
        self.needs_root()
        try:
            stock, ours = self.compare('''
                - hosts: all
                  gather_facts: false
                  tasks:
                    - {name: join, command: usermod -a -G games mslab, become: true}
                    - meta: reset_connection
                    - {name: groups, command: id -Gn}
                ''', between=lambda: sh('gpasswd', '-d', 'mslab', 'games'))
            self.assertIn('games', ours.result('groups')['stdout'])
        finally:
            subprocess.run(['gpasswd', '-d', 'mslab', 'games'], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)

    @newest
    def test_reboot(self):
        """A second sshd is stopped with all its sessions, and started again."""
        self.needs_root()
        results = []
        for engine in (self.stock, self.plugin):
            server = LAB.sshd()
            LAB.write('boot', '1')
            script = '#!/bin/sh\nsetsid sh -c "sleep 1; echo 2 > %s; kill -s TERM -- -%d" >/dev/null 2>&1 </dev/null &\n' % (
                LAB.path('boot'), server.process.pid)
            LAB.write('reboot', script)
            os.chmod(LAB.path('reboot'), 0o755)
            play = self.new(engine, tasks(
                '{name: before, command: id -un}',
                '{name: reboot, become: true, reboot: {reboot_command: "%s", boot_time_command: "cat %s", '
                'reboot_timeout: 40, connect_timeout: 3, post_reboot_delay: 1}}' % (LAB.path('reboot'), LAB.path('boot')),
                '{name: after, command: id -un}'), hosts={'t1': {'ansible_port': server.port}}).start()
            try:
                server.process.wait(30)
            except subprocess.TimeoutExpired:
                self.fail('the server was not stopped: ' + play.finish().tail())
            time.sleep(1)
            server.start()
            play.finish()
            self.assertEqual(play.rc, 0, play.tail())
            results.append([play.status(task) for task in ('before', 'reboot', 'after')])
            self.remove_control(play)
            server.stop()
        self.assertEqual(*results)

    @newest
    def test_dynamic_inventory(self):
        address = dict(LAB.variables(), ansible_host='127.0.0.9')
        self.compare(tasks(
            'add_host: {name: new, groups: fresh, %s}' % ', '.join(
                '%s: %s' % (key, json.dumps(value)) for key, value in address.items()),
            'group_by: {key: "os_{{ inventory_hostname }}"}') + '''
- hosts: fresh:os_t1
  gather_facts: false
  tasks:
    - command: echo {{ group_names }}
'''.replace('echo {{ group_names }}', '"echo {{ group_names }}"'), logins={LAB.login: 2})

    @newest
    def test_tags_limit_and_start_at(self):
        book = tasks('{name: a, command: echo a, tags: x}', '{name: b, command: echo b}',
                     '{name: c, command: echo c, tags: x}')
        for args in (['--tags', 'x'], ['--skip-tags', 'x'], ['--start-at-task', 'b'], ['--limit', 't2']):
            with self.subTest(args=args):
                self.compare(book, hosts=many_hosts(2), args=args)

    @newest
    def test_lookups(self):
        self.compare(tasks('command: "echo {{ lookup(\'pipe\', \'echo piped\') }}"',
                           'command: "echo {{ lookup(\'file\', \'f\') }}"',
                           'command: "echo {{ lookup(\'env\', \'HOME\') | basename }}"',
                           'debug: {msg: "{{ query(\'lines\', \'cat f\') }}"}'),
                     files={'f': 'in a file\n'})

    def test_lookups_that_wait(self):
        """Hosts do so side by side; what a plugin returns, raises or leaves changed is as in a forked worker."""
        self.compare(tasks(
            '{name: "side by side", debug: {msg: "{{ lookup(\'own\', \'meet\', 4) }}"}}',
            '{name: loop, command: "echo {{ lookup(\'own\', \'host\') }} {{ item }}", loop: [1, 2, 3, 4]}',
            '{name: with, command: "echo {{ item }}", with_own: [host]}',
            '{name: nested, debug: {msg: "{{ query(\'own\', \'nested\') }}"}}',
            '{name: no terminal, debug: {msg: "{{ lookup(\'own\', \'terminal\') }}"}}',
            '{name: changes, debug: {msg: "{{ lookup(\'own\', \'change\') }}"}}',
            '{name: unchanged, debug: {msg: "{{ lookup(\'own\', \'look\') }}"}}',
            '{name: fails, debug: {msg: "{{ lookup(\'own\', \'fail\') }}"}, ignore_errors: true}',
            '{name: fails oddly, debug: {msg: "{{ lookup(\'own\', \'fail_oddly\') }}"}, ignore_errors: true}',
            '{name: forgiven, debug: {msg: "{{ lookup(\'own\', \'fail\', errors=\'ignore\') }}"}}',
            '{name: undefined, debug: {msg: "{{ lookup(\'own\', nothing) }}"}, ignore_errors: true}',
            '{name: warns, debug: {msg: "{{ lookup(\'own\', \'warn\') }}"}, register: warned}',
            '{name: warned, debug: {msg: "{{ [warned.warnings, warned.deprecations] }}"}, when: warned.warnings is defined}',
            'setup: {gather_subset: "!all"}',
            '{name: deprecated, command: "echo {{ lookup(\'own\', \'use\', old) }}", register: used, '
            'vars: {old: ["{{ ansible_system }}"]}}',
            '{name: told, debug: {msg: "{{ used.deprecations | d([]) }}"}}'),
            hosts=many_hosts(4), files={'lookup_plugins/own.py': OWN_LOOKUP}, without=('exception',))

    def test_plugin_that_needs_a_main_thread(self):
        """Only there may a filter set an alarm: its task becomes a process, before anything of it was seen."""
        self.compare(tasks(
            '{name: argument, command: "echo {{ \'a\' | alarmed }}"}', '{name: debug, debug: {msg: "{{ \'a\' | alarmed }}"}}',
            '{name: loop, command: "echo {{ item | alarmed }}", loop: [1, 2, 3, 4]}',
            '{name: loop of debug, debug: {msg: "{{ item | alarmed }}"}, loop: [1, 2, 3]}',
            '{name: condition, command: echo yes, when: "\'a\' | alarmed == \'a\'"}', '{name: after, command: echo after}',
            '{name: own process, command: "echo {{ \'a\' | elsewhere }}"}',
            '{name: changed, command: echo yes, changed_when: "\'a\' | alarmed == \'b\'"}',
            '{name: failed, command: echo no, failed_when: "\'a\' | alarmed == \'a\'", ignore_errors: true}',
            '{name: until, command: echo maybe, until: "\'a\' | alarmed == \'a\'", retries: 2, delay: 0}',
            '{name: broken, command: echo no, changed_when: "nothing | alarmed", ignore_errors: true}',
            '{name: judged loop, command: echo yes, changed_when: "item | alarmed == 2", loop: [1, 2, 3, 4]}'),
            hosts=many_hosts(2), files={'filter_plugins/alarmed.py': ALARMED})

    def test_plugin_that_changes_the_process(self):
        """The next task does not see it, nor does another host, nor the same task that goes on."""
        self.compare(tasks(
            '{name: before, debug: {msg: "{{ 0 | look }}"}}',
            '{name: changes, command: "echo {{ 0 | change }} {{ 0 | look }}", changed_when: "0 | look | length == 0"}',
            '{name: after, debug: {msg: "{{ 0 | look }}"}}',
            '{name: loop, command: "echo {{ item | change }} {{ item | look }}", loop: [1, 2, 3]}',
            '{name: remembers, debug: {msg: "{{ 1 | remember }}"}}',
            '{name: in the end, debug: {msg: "{{ 0 | look }} {{ 2 | remember }}"}}'),
            hosts=many_hosts(2), files={
                'filter_plugins/mischief.py': MISCHIEF,
                'collections/ansible_collections/ns/col/plugins/plugin_utils/shared.py': 'TABLE = {}\n'})

    def test_heavy_tasks(self):
        """The first host shows that a task is one; the others are processes, though they were threads already."""
        stock, ours = self.compare(tasks(
            '{name: heavy, command: printenv PID, environment: {PID: "{{ 0.2 | burn }}"}}', '{name: light, command: echo light}',
            '{name: waiting, command: printenv PID, environment: {PID: "{{ 0.3 | doze }}"}}',
            '{name: quick, command: printenv PID, environment: {PID: "{{ 0 | burn }}"}}'), hosts=many_hosts(4), logins={LAB.login: 4},
            files={'filter_plugins/burn.py': BURN}, without=('stdout', 'stdout_lines'))
        if self.ours:
            pids = {name: [event['result']['stdout'] for event in ours.events()
                           if event['event'] == 'runner_ok' and event['task'] == name] for name in ('heavy', 'waiting', 'quick')}
            self.assertEqual([len(set(pids[name])) for name in ('heavy', 'waiting')], [4, 4], pids)
            self.assertLess(len(set(pids['quick'])), 4, pids)


OWN_LOOKUP = '''
    import os, time
    from ansible.errors import AnsibleError
    from ansible.plugins.lookup import LookupBase
    from ansible.utils.display import Display

    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__('%s and %s' % (one, two))

    class LookupModule(LookupBase):
        def run(self, terms, variables=None, **kwargs):
            return [getattr(self, terms[0])(variables, *terms[1:])]

        def host(self, variables):
            return variables['inventory_hostname']

        def meet(self, variables, count):
            place = os.path.join(variables['playbook_dir'], 'met')
            os.makedirs(place, exist_ok=True)
            open(os.path.join(place, self.host(variables)), 'w').close()
            for _ in range(300):
                if len(os.listdir(place)) == count:
                    return 'all came'
                time.sleep(0.1)
            raise AnsibleError('nobody came')

        def nested(self, variables):
            return {'list': [1, 'two', None], 'host': self.host(variables)}

        def use(self, variables, values):
            return 'on %s' % values[0]

        def terminal(self, variables):
            try:
                return os.open('/dev/tty', os.O_RDWR)
            except OSError:
                return 'none'

        def change(self, variables):
            time.sleep(0.1)
            os.environ['OWN'] = 'changed'
            os.umask(0o7)
            os.chdir('/')
            return 'done'

        def look(self, variables):
            mask = os.umask(0)
            os.umask(mask)
            return [os.environ.get('OWN'), mask, os.getcwd() == '/']

        def fail(self, variables):
            try:
                {}['reason']
            except KeyError as e:
                raise AnsibleError('it failed') from e

        def fail_oddly(self, variables):
            raise Odd(1, 2)

        def warn(self, variables):
            for _ in range(2):
                Display().warning('take care')
            Display().deprecated('too old', version='9.9')
            return 'warned'
    '''

MISCHIEF = '''
import functools, locale, os, socket, time
from ansible_collections.ns.col.plugins.plugin_utils import shared

TABLE = {'old': [1]}
count = 0
os.environ['IMPORTED'] = 'yes'
socket.setdefaulttimeout(70)


class Kept:
    names = []
    last = None


@functools.lru_cache(None)
def cached(value):
    return value


def remember(value):
    return cached(value), cached.cache_info().currsize


def change(value):
    global count, fresh
    count += 1
    fresh = count
    TABLE['old'].append(2)
    TABLE['new'] = object()
    Kept.names.append('one')
    Kept.last = Kept()
    shared.TABLE['more'] = 'less'
    os.environ['OWN'] = 'changed'
    os.environ['TZ'] = 'XYZ-3'
    time.tzset()
    os.umask(0o7)
    os.chdir('/')
    socket.setdefaulttimeout(7)
    locale.setlocale(locale.LC_ALL, 'C')
    return 'done'


def look(value):
    mask = os.umask(0)
    os.umask(mask)
    kept = TABLE['old'], sorted(TABLE), count, 'fresh' in globals(), Kept.names, Kept.last is None, shared.TABLE
    return '%s %s %s %s %s %s %s %s' % (
        kept, os.environ['IMPORTED'], os.environ.get('OWN'), time.tzname[0] == 'XYZ', mask, socket.getdefaulttimeout(),
        locale.setlocale(locale.LC_ALL), os.getcwd() == '/')


class FilterModule:
    def filters(self):
        return {'change': change, 'look': look, 'remember': remember}
'''

ALARMED = '''
import multiprocessing
import signal


def elsewhere(value):
    context = multiprocessing.get_context('fork')
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(theirs, value))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def send(pipe, value):
    pipe.send(alarmed(value))


def alarmed(value):
    before = signal.signal(signal.SIGALRM, lambda *args: None)
    signal.signal(signal.SIGALRM, before)
    return value


class FilterModule:
    def filters(self):
        return {'alarmed': alarmed, 'elsewhere': elsewhere}
'''

BURN = '''
    import os, time

    def burn(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return os.getpid()

    def doze(seconds):
        time.sleep(seconds)
        return os.getpid()

    class FilterModule:
        def filters(self):
            return {'burn': burn, 'doze': doze}
    '''


class Everywhere(Engine):
    """The plugin among vars plugins: it serves whatever strategy a play names."""

    def environment(self):
        place = LAB.path('everywhere')
        os.makedirs(place, exist_ok=True)
        if not os.path.exists(place + '/mitogen_single.py'):
            os.symlink(PLUGIN, place + '/mitogen_single.py')
        return {'ANSIBLE_VARS_PLUGINS': place}


TURNS = '''
- hosts: all
  gather_facts: false
  strategy: STRATEGY
  serial: [1, 2]
  handlers:
    - {name: tell, command: "echo told {{ inventory_hostname }}"}
  tasks:
    - {name: one, command: "echo {{ inventory_hostname }}", notify: tell}
    - {name: throttled, command: "echo {{ item }}", loop: [1, 2], throttle: 1}
    - {name: skipped by some, debug: {msg: only one}, when: inventory_hostname == 't2'}
    - block:
        - {name: fails on one, command: "test {{ inventory_hostname }} != t3"}
      rescue:
        - {name: rescued, command: echo rescued}
      always:
        - {name: always, set_fact: {seen: "{{ inventory_hostname }}"}}
    - include_tasks: more.yml
    - {name: once, command: hostname, run_once: true}
    - meta: flush_handlers
    - {name: ends for one, meta: end_host, when: inventory_hostname == 't3'}
    - {name: last, debug: {var: seen}}
'''
NAMES = {'mitogen_single': 'linear', 'mitogen_single_linear': 'linear', 'mitogen_single_free': 'free',
         'mitogen_single_host_pinned': 'host_pinned', 'mitogen_single_debug': 'debug', 'mitogen': 'linear',
         'mitogen_linear': 'linear', 'mitogen_free': 'free', 'mitogen_host_pinned': 'host_pinned'}


def plays(strategies, extra=''):
    """A play for each: the number of times that a task is said to start, and with one fork the order, tell them apart."""
    return ''.join('- hosts: all\n  gather_facts: false\n  strategy: %s\n%s  tasks:\n'
                   '    - {name: a, command: echo a}\n    - {name: b, debug: {msg: b}}\n' % (name, extra)
                   for name in strategies)


VOLATILE_TEXT = (r'\d+:\d\d:\d\d[.\d]*|\d+\.\d+s?|\d+ seconds|\w+day \d\d \w+ \d{4}|[0-9a-f]{8}(-[0-9a-f]+){4}|'
                 r'time(stamp)?="[^"]*"')


class RealStrategies(Real):
    """Those of Ansible's own, under their names and those of this file, with all that they print."""

    every_core = OLDEST_CORE
    pipelining = True

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.by_name = cls.plugin
        if cls.ours:
            cls.plugin = Everywhere('plugin', cls.core)

    def assert_same(self, stock, ours, without=()):
        """With several forks it is chance whose task a strategy other than linear starts first, and how many hosts
        come to an include at once."""
        expected, got = story(stock, without), story(ours, without)
        for told in (expected, got):
            events = told.get('all', [])
            told['all'] = sorted([event for event in events if event[0] != 'include'], key=str)
            told['included'] = sorted({event[1] for event in events if event[0] == 'include'})
        self.assertEqual(differences(expected, got), [], ours.tail())
        self.assertEqual(stock.rc, ours.rc, ours.tail())

    def assert_same_text(self, stock, ours):
        """What a user sees, to the letter."""
        for name in ('out', 'err'):
            texts = [normal(getattr(play, name), play) for play in (stock, ours)]
            self.assertEqual(*[re.sub(VOLATILE_TEXT, 'N', text) for text in texts])

    def test_in_turns(self):
        for strategy in ('linear', 'free', 'host_pinned'):
            with self.subTest(strategy):
                self.compare(TURNS.replace('STRATEGY', strategy), hosts=many_hosts(3), logins={LAB.login: 3},
                             files={'more.yml': '- {name: included, command: echo included}\n'}, pipelining=True)

    def test_by_name(self):
        """One playbook, a play for each name, one connection for all of them."""
        stock = self.new(self.stock, plays(NAMES.values()), hosts=many_hosts(2), args=['-f', '1'],
                         env={'ANSIBLE_PIPELINING': '1'}).run()
        ours = self.new(self.by_name, plays(NAMES), hosts=many_hosts(2), args=['-f', '1'],
                        env={'ANSIBLE_STRATEGY_PLUGINS': 'names'} if self.ours else {})
        os.mkdir(os.path.join(ours.dir, 'names'))
        for name in NAMES if self.ours else ():
            os.symlink(PLUGIN, os.path.join(ours.dir, 'names', name + '.py'))
        if not self.ours:
            ours.write_files({'play.yml': plays(NAMES.values())})
        ours.run()
        self.assertEqual(stock.rc, 0, stock.tail())
        self.assertEqual(differences(story(stock), story(ours)), [], ours.tail())
        self.assert_counts(ours, {LAB.login: 2}, None)

    @newest
    def test_by_setting(self):
        """By a variable, and by the environment where there is none."""
        self.needs_plugin()
        stock = self.new(self.stock, plays(['host_pinned', 'free']), hosts=many_hosts(2), args=['-f', '1']).run()
        book = (plays(['mitogen_single'], '  vars: {mitogen_single_strategy: "{{ wish }}"}\n') +
                plays(['mitogen_single']))
        ours = self.new(self.by_name, book, hosts=many_hosts(2), args=['-f', '1', '-e', 'wish=host_pinned'],
                        env={'MITOGEN_SINGLE_STRATEGY': 'free'}).run()
        self.assertEqual(differences(story(stock), story(ours)), [], ours.tail())
        self.assert_counts(ours, {LAB.login: 2}, None)

    def test_debugger(self):
        """The debug strategy, and the keyword of a task: look, mend, try again, go on."""
        book = tasks('{name: bad, command: "test {{ x }} = y", vars: {x: n}}',
                                 '{name: worse, command: /bin/false, debugger: always, ignore_errors: true}')
        for env, stdin in (({'ANSIBLE_STRATEGY': 'debug'},
                            'p task_vars["x"]\ntask_vars["x"] = "y"\nupdate_task\nredo\np result._host\nc\n'),
                           ({'ANSIBLE_ENABLE_TASK_DEBUGGER': '1'}, 'p host\nc\nc\n'),
                           ({'ANSIBLE_ENABLE_TASK_DEBUGGER': '1'}, 'q\n')):
            with self.subTest(env=env, stdin=stdin):
                stock, ours = (self.new(engine, book, env=env, stdin=stdin).run() for engine in (self.stock, self.plugin))
                self.assert_same(stock, ours)
                self.assert_same_text(stock, ours)
                self.assertIn('[t1] TASK: bad (debug)>', ours.out)

    @newest
    def test_step(self):
        for answers in ('y\nn\ny\n', 'n\nc\n'):
            stock, ours = self.compare(tasks('{name: a, command: echo a}', '{name: b, command: echo b}',
                                             '{name: c, debug: {msg: c}}'), args=['--step'], stdin=answers)
            self.assert_same_text(stock, ours)

    @newest
    def test_start_at_task(self):
        for strategy in ('linear', 'free'):
            self.compare(plays([strategy]), args=['--start-at-task', 'b'], hosts=many_hosts(2))

    def test_callbacks(self):
        """Who writes the output, and who writes along."""
        self.needs_collections()
        book = tasks('{name: good, command: echo good}', '{name: loop, debug: {msg: "{{ item }}"}, loop: [1, 2]}',
                     '{name: bad, command: /bin/false, ignore_errors: true}', '{name: secret, command: id, no_log: true}')
        enabled = 'msrecord,ansible.builtin.junit,ansible.posix.timer,ansible.posix.profile_tasks'
        for env in ({'ANSIBLE_STDOUT_CALLBACK': 'ansible.posix.json'}, {'ANSIBLE_STDOUT_CALLBACK': 'minimal'},
                    {'ANSIBLE_STDOUT_CALLBACK': 'oneline'}, {'ANSIBLE_CALLBACKS_ENABLED': enabled,
                                                             'PROFILE_TASKS_SORT_ORDER': 'none',
                                                             'JUNIT_OUTPUT_DIR': 'junit'}):
            with self.subTest(env=env):
                stock, ours = self.compare(book, env=env, pipelining=True)
                self.assert_same_text(stock, ours)
        reports = [glob.glob(play.dir + '/junit/*.xml') for play in (stock, ours)]
        self.assertEqual([len(found) for found in reports], [1, 1])
        texts = []
        for play, (path,) in zip((stock, ours), reports):
            with open(path) as file:
                texts.append(re.sub(VOLATILE_TEXT, 'N', normal(file.read(), play)))
        self.assertEqual(*texts)

    def needs_collections(self):
        if not collections_path():
            self.skipTest('no collections: PyPI is out of reach')


# 16 FAILURES ####################################################################################

GO_ON = '''
- hosts: all
  gather_facts: false
  tasks:
    - name: first
      command: echo first
    - name: second
      stat: {path: /etc/hostname}
- hosts: all
  gather_facts: false
  tasks:
    - name: third
      command: echo third
'''


class Silent:
    """A server that accepts and never says a word."""

    def __enter__(self):
        self.socket = socket.socket()
        self.socket.bind(('127.0.0.1', 0))
        self.socket.listen(50)
        return self.socket.getsockname()[1]

    def __exit__(self, *exception):
        self.socket.close()


class RealFailures(Real):
    every_core = OLDEST_CORE

    def test_port_closed(self):
        self.compare_failure(GO_ON, 'unreachable', 'refused',
                             hosts={'bad': {'ansible_port': 1}, 'good': {}})

    @newest
    def test_unknown_host(self):
        self.compare_failure(GO_ON, 'unreachable', '(?i)resolve',
                             hosts={'bad': {'ansible_host': 'no.such.host.invalid'}, 'good': {}})

    def test_connect_timeout(self):
        with Silent() as port:
            self.compare_failure(GO_ON, 'unreachable', '(?i)timed? ?out', env={'ANSIBLE_TIMEOUT': '3'},
                                 hosts={'bad': {'ansible_port': port}, 'good': {}})

    @newest
    def test_no_ssh_program(self):
        self.compare_failure(GO_ON, None, 'no-such-ssh',
                             hosts={'t1': {'ansible_ssh_executable': '/no-such-ssh'}})

    @newest
    def test_bad_ssh_option(self):
        self.compare_failure(GO_ON, 'unreachable', '(?i)nonsense',
                             hosts={'t1': {'ansible_ssh_extra_args': '-o Nonsense=yes'}})

    @newest
    def test_unreachable_ignored_and_rescued(self):
        self.compare('''
            - hosts: all
              gather_facts: false
              tasks:
                - {name: lost, command: echo x, ignore_unreachable: true, register: r}
                - debug: {msg: "{{ r.unreachable | default(false) }}"}
                - {command: echo y, when: inventory_hostname == 'good'}
            ''', hosts={'bad': {'ansible_port': 1}, 'good': {}}, without=TEXTS)

    def test_noisy_login(self):
        self.needs_root()
        self.compare(WHO + '    - {copy: {content: "x\\n", dest: ~/x}}\n    - {fetch: {src: ~/x, dest: fetched/}}\n'
                     '    - {file: {path: ~/x, state: absent}}\n'
                     '    - {ping: }\n', hosts={'t1': {'ansible_user': 'msnoisy'}},
                     without=('stderr', 'stderr_lines', 'module_stderr'))

    def test_other_login_shells(self):
        """Which have their own idea of quotes, exclamation marks and dollars."""
        self.needs_root()
        self.addCleanup(sh, 'usermod', '-s', '/bin/bash', 'msapp')
        for shell in ('tcsh', 'fish', 'dash'):
            with self.subTest(shell):
                if not shutil.which(shell):
                    self.skipTest('no %s on this machine' % shell)
                sh('usermod', '-s', shutil.which(shell), 'msapp')
                self.compare(tasks('command: echo hello', 'shell: "echo $HOME $((1 + 1)); echo \\"it is\\" >&2"', 'raw: echo $HOME',
                                   'copy: {content: "x\\n", dest: ~/x}', 'file: {path: ~/x, state: absent}'),
                             hosts={'t1': {'ansible_user': 'msapp'}}, pipelining=True)

    def test_unwritable_home(self):
        self.needs_root()
        self.compare(tasks('command: id -un', 'stat: {path: /etc/hostname}', 'command: pwd'),
                     pipelining=True,
                     hosts={'t1': {'ansible_user': 'msrohome'}})

    @newest
    def test_copy_into_unwritable_home(self):
        """Stock fails here before it starts, for want of a directory that we do not need."""
        self.needs_root()
        play = self.run_ours(tasks('{name: copy, copy: {content: x, dest: ~/x}, ignore_errors: true, ignore_unreachable: true}',
                                   '{name: next, command: id -un}'),
                             hosts={'t1': {'ansible_user': 'msrohome'}},
                             env={'ANSIBLE_PIPELINING': '1'})
        self.assertIn(play.status('copy'), ('failed', 'unreachable'), play.tail())
        self.assertEqual(play.status('next'), 'ok', play.tail())

    def on_odd_machine(self, prepare='', settings='', **options):
        """An sshd with `settings` more, and in a mount namespace of its own what the shell line `prepare` made."""
        self.needs_root()
        try:
            server = LAB.sshd(prepare, settings)
        except RuntimeError:
            self.skipTest('no mount namespaces on this machine')
        try:
            self.compare(WHO + '    - {copy: {content: "x\\n", dest: ~/x}}\n    - {file: {path: ~/x, state: absent}}\n'
                         '    - {command: id -un, become: true}\n    - {getent: {database: passwd, key: root}}\n',
                         hosts={'t1': {'ansible_port': server.port}}, **options)
        finally:
            server.stop()

    @newest
    def test_few_descriptors_and_processes(self):
        self.on_odd_machine('ulimit -n 100; ulimit -u 35')

    @newest
    def test_little_memory(self):
        """Modules that want more than there is fail as in stock; the agent, and what is too big for memory, do not."""
        self.needs_root()
        server = LAB.sshd('ulimit -v 250000')
        self.addCleanup(server.stop)
        eats = '#!/usr/bin/python\nfrom ansible.module_utils.basic import AnsibleModule\nmodule = AnsibleModule({})\n' \
               'module.exit_json(size=len(bytearray(1 << 30)))\n'
        self.compare(tasks(
            'file: {path: OUT, state: directory}', 'copy: {src: big, dest: OUT/big}', '{name: eats, eats: {}, ignore_errors: true}',
            '{shell: "python3 -c \'x = bytearray(1 << 30)\'", ignore_errors: true}', 'command: id -un',
            'fetch: {src: OUT/big, dest: back, flat: true}', '{command: id -un, become: true}').replace('OUT', self.out),
            hosts={'t1': {'ansible_port': server.port}}, files={'library/eats.py': eats, 'big': os.urandom(1 << 20) * 120},
            pipelining=True, without=('exception', 'msg', 'module_stderr', 'module_stdout', 'stderr', 'stderr_lines'))

    @newest
    def test_no_shared_memory(self):
        self.on_odd_machine('mount -t tmpfs -o ro tmpfs /dev/shm')

    @newest
    def test_one_session_per_connection(self):
        """Of two settings sshd takes the first."""
        self.on_odd_machine(settings='MaxSessions 1\n')

    @newest
    def test_full_tmp(self):
        self.on_odd_machine('mount -t tmpfs -o size=16k,mode=1777 tmpfs /tmp && (dd if=/dev/zero of=/tmp/fill 2>/dev/null; true)')

    @newest
    def test_read_only_tmp(self):
        self.on_odd_machine('mount -t tmpfs -o ro,size=16k,mode=1777 tmpfs /tmp')

    @newest
    def test_noexec_tmp(self):
        self.on_odd_machine('mount -t tmpfs -o noexec,size=1m,mode=1777 tmpfs /tmp')

    @newest
    def test_unmount(self):
        """Of a file system in which tasks had their directory and their files: nothing of ours keeps it busy."""
        self.needs_root()
        server = LAB.sshd('true')
        self.addCleanup(server.stop)
        accounts = '', ', become: true, become_user: msapp'
        uses = ('{command: pwd, args: {chdir: /mnt}, async: 20, poll: 1WHO}', '{copy: {content: "x\\n", dest: /mnt/N}WHO}',
                '{command: pwd, args: {chdir: /mnt}WHO}')
        book = tasks('{command: mount -t tmpfs -o mode=1777 tmpfs /mnt, become: true}',
                     *[use.replace('N', str(n)).replace('WHO', who) for n, who in enumerate(accounts) for use in uses],
                     '{command: umount /mnt, become: true}', '{stat: {path: /mnt/0}}', 'command: id -un')
        self.compare(book, hosts={'t1': {'ansible_port': server.port, 'ansible_remote_tmp': '/mnt/tmp'}}, pipelining=True)

    @newest
    def test_upgrades(self):
        """Of Python, sudo and OpenSSH below all that runs: what is at work goes on, what is new starts."""
        self.needs_root()
        self.needs_slow('packages from the network')
        server = LAB.sshd('''mount -t tmpfs tmpfs /mnt && for d in usr var etc; do mkdir -p /mnt/$d/up /mnt/$d/work &&
            mount -t overlay -o lowerdir=/$d,upperdir=/mnt/$d/up,workdir=/mnt/$d/work overlay /$d || exit; done;
            echo exit 101 > /usr/sbin/policy-rc.d''')
        self.addCleanup(server.stop)
        upgrade = ('apt-get -q update; DEBIAN_FRONTEND=noninteractive apt-get -q install -y --reinstall '
                   '--no-install-recommends sudo openssh-server openssh-client '
                   '$(dpkg-query -W -f \'${db:Status-Abbrev}${Package}\\n\' \'*python3*-minimal\' \'*python3*-stdlib\' | '
                   'sed -n "s/^ii //p")')
        looks = '- {command: id -un}', '- {command: id -un, become: true}', '- {getent: {database: passwd, key: root}}'
        new = ('- {command: id -un, become: true, become_user: msapp}', '- {setup: {gather_subset: ["!all", min]}}',
               '- {copy: {content: x, dest: ~/x}}', '- {command: id -un, async: 20, poll: 1}', '- {file: {path: ~/x, state: absent}}')
        play = '- hosts: %s\n  gather_facts: false\n  tasks:\n    '
        book = [play % 't1', *looks, '- {name: upgrade, become: true, shell: %s}' % json.dumps(upgrade), *looks, *new, '\n']
        stock, ours = self.compare('\n    '.join(book) + play % 't2' + '\n    '.join(looks + new), pipelining=True,
                                   hosts={name: {'ansible_port': server.port, 'ansible_host': '127.0.0.%s' % name[1]}
                                          for name in ('t1', 't2')}, without=('stdout', 'stdout_lines', 'ansible_facts'))
        self.assertIn('Setting up sudo', ours.result('upgrade')['stdout'])

    def test_python_too_old(self):
        found = pythons()
        old = next((found[v] for v in ('2.7', '3.6', '3.7') if v in found and v not in TARGETS[self.core].split()
                    and by_version([v, TARGETS[self.core].split()[0]])[0] == v), None)
        if old is None:
            self.skipTest('not on this ansible-core: no Python here is too old for it')
        self.compare_failure(WHO, None, r'(?i)python|interpreter|syntax', hosts={
            't1': dict(self_login(), ansible_python_interpreter=old)})

    # Killed in the middle.

    KILLS = '''
        - hosts: all
          gather_facts: false
          tasks:
            - {name: before, command: echo before}
            - {name: victim, command: sleep 61.5, ignore_errors: true, ignore_unreachable: true, when: inventory_hostname == 't1'}
            - {name: after, command: echo after}
        '''

    def kill_during_sleep(self, choose, sign=signal.SIGKILL, orphans=False, **options):
        """Run KILLS on two hosts and kill what `choose` finds while the victim sleeps.

        `orphans`: what the killed process had started lives on, as in stock: nobody is left to end it.
        """
        self.needs_plugin()
        play = self.new(self.plugin, self.KILLS, hosts=many_hosts(2), timeout=55, **options).start()
        try:
            sleeper = wait_for(lambda: self.sleepers(play), 20, 'the victim does not start')[0]
            targets = choose(play, sleeper)
            self.assertTrue(targets, 'nothing to kill')
            for pid in targets:
                kill(pid, sign)
        finally:
            play.finish()
        self.assertFalse(play.hung, 'hangs: ' + play.tail())
        self.assertIn(play.status('victim', 't1'), ('failed', 'unreachable'), play.tail())
        for host in ('t1', 't2'):
            self.assertEqual(play.status('after', host), 'ok', play.tail())
        self.assertEqual(play.rc, 0, play.tail())
        if not orphans:
            self.assertEqual(play.left_behind(), [], play.tail())
        return play

    def sleepers(self, play):
        return [pid for pid in play.processes() if proc(pid,
                                                        'cmdline').startswith('sleep\0') and '61.5' in proc(pid, 'cmdline')]

    def test_module_killed(self):
        self.kill_during_sleep(lambda play, sleeper: [parent_of(sleeper)], orphans=True)

    def test_agent_killed(self):
        self.kill_during_sleep(lambda play, sleeper: [parent_of(parent_of(sleeper))], orphans=True)

    @newest
    def test_forced_command(self):
        """An account that may only run one program."""
        self.needs_root()
        server = LAB.sshd('', 'ForceCommand echo forced\n')
        try:
            self.compare_failure(WHO, None, 'forced', hosts={'t1': {'ansible_port': server.port}}, ignore=TEXTS + ('rc',))
        finally:
            server.stop()

    @newest
    def test_stopped_and_continued(self):
        """Whoever is stopped for a while, be it by a debugger: it takes longer."""
        self.needs_plugin()
        for who, choose in (('module', lambda play, sleeper: [parent_of(sleeper)]),
                            ('agent', lambda play, sleeper: [parent_of(parent_of(sleeper))]), ('ssh', self.ssh_of),
                            ('broker', lambda play, sleeper: [parent_of(self.ssh_of(play, sleeper)[0])])):
            with self.subTest(who):
                play = self.new(self.plugin, self.KILLS.replace('61.5', '3.61'), hosts=many_hosts(2), timeout=40).start()
                try:
                    sleeper = wait_for(lambda: [pid for pid in play.processes() if proc(pid, 'cmdline') == 'sleep\0003.61\0'],
                                       20, 'the victim does not start')[0]
                    stopped = choose(play, sleeper)
                    self.assertTrue(stopped, 'nobody to stop')
                    for pid in stopped:
                        kill(pid, signal.SIGSTOP)
                    time.sleep(4)
                    for pid in stopped:
                        kill(pid, signal.SIGCONT)
                finally:
                    play.finish()
                self.assertEqual([play.rc, play.status('victim', 't1'), play.status('after', 't2')], [0, 'ok', 'ok'],
                                 play.tail())
                self.assertEqual(play.left_behind(), [], play.tail())

    @newest
    def test_link_frozen(self):
        """Nothing comes any more, and nothing says so, but for the keepalives of ssh that nobody answers."""
        stopped = []

        def session(play, sleeper):
            pid = sleeper
            while pid > 1 and proc(pid, 'comm').strip() not in ('sshd', 'sshd-session'):
                pid = parent_of(pid)
            self.assertGreater(pid, 1, 'no session of sshd')
            stopped.append(pid)
            return [pid]

        try:
            play = self.kill_during_sleep(session, signal.SIGSTOP, orphans=True,
                                          env={'MITOGEN_SINGLE_SSH_KEEPALIVE_INTERVAL': '1'})
        finally:
            for pid in stopped:
                kill(pid)
        self.assertEqual(play.status('victim', 't1'), 'unreachable', play.tail())

    def ssh_of(self, play, sleeper):
        """The ssh process of the host on which the sleeper sleeps: by the port of its end."""
        mine = re.search(r'SSH_CONNECTION=\S+ (\d+) ', proc(sleeper, 'environ'))
        return [pid for pid in play.processes() if proc(pid, 'comm').strip() == 'ssh'
                and '127.0.0.1\0' in proc(pid, 'cmdline')] if mine else []

    @newest
    def test_spares_killed(self):
        """Children of an agent that wait to be modules are no loss."""
        alone = ('me=$PPID; for p in $(pgrep -P $(ps -o ppid= -p $me)); do test $p = $me || '
                 'kill -9 $p && echo killed; done; true')
        play = self.run_ours(tasks(*['getent: {database: passwd}'] * 2, '{name: kill, shell: "%s"}' % alone,
                                   *['command: echo hello'] * 9))
        self.assertEqual(play.rc, 0, play.tail())
        self.assertIn('killed', play.result('kill')['stdout'] if self.ours else 'killed')
        self.assert_counts(play, {LAB.login: 1}, {})

    def test_ssh_killed(self):
        self.kill_during_sleep(self.ssh_of)

    @newest
    def test_ssh_terminated(self):
        self.kill_during_sleep(self.ssh_of, signal.SIGTERM)

    def test_broker_killed(self):
        def broker(play, sleeper):
            parents = {parent_of(pid) for pid in self.ssh_of(play, sleeper)} - {play.process.pid, 1}
            return sorted(parents)
        self.kill_during_sleep(broker)

    @newest
    def test_server_gone(self):
        """The sshd and its sessions are killed: the rest of the run says so and ends."""
        self.needs_plugin()
        self.needs_root()
        server = LAB.sshd()
        play = self.new(self.plugin, self.KILLS,
                        hosts={'t1': {'ansible_port': server.port}, 't2': {'ansible_host': '127.0.0.2'}},
                        timeout=55).start()
        wait_for(lambda: self.sleepers(play), 20, 'the victim does not start')
        sessions = [pid for pid in all_pids() if server.process.pid in (parent_of(pid), parent_of(parent_of(pid) or 1))]
        for pid in sessions + [server.process.pid]:     # sessions are in process groups of their own
            kill(pid)
        server.process.wait()
        play.finish()
        self.assertFalse(play.hung, 'hangs: ' + play.tail())
        self.assertEqual(play.status('victim', 't1'), 'unreachable', play.tail())
        self.assertEqual(play.status('after', 't2'), 'ok', play.tail())
        self.assertEqual(play.left_behind(), [], play.tail())

    def test_task_timeout(self):
        stock, ours = self.compare(tasks('{name: slow, command: sleep 30, timeout: 2, ignore_errors: true}',
                                         '{name: after, command: echo after}'),
                                   without=TEXTS + ('timedout',))
        self.assertLess(ours.seconds, 20)


def self_login():
    """Variables that log in as the user who runs the tests: Pythons in its home are out of others' reach."""
    return {'ansible_user': getpass.getuser()}


# 17 LEFTOVERS ###################################################################################

ANSIBLES_OWN = re.compile(r'ansible-local-|/pymp-|/ansible-tmp-')      # after kill -9 nobody is left to remove them


class RealLeftovers(Real):
    """However a run ends: 5 seconds later there is no process and no temporary directory of ours."""

    every_core = TELLING_CORES
    BOOK = '''
        - hosts: all
          gather_facts: false
          tasks:
            - {name: warm, command: echo warm}
            - {name: sleep, shell: "sleep 62.5 & sleep 62.5", become: BECOME}
            - {name: never, command: echo never}
        '''

    def interrupted(self, interrupt, become=False):
        self.needs_plugin('stock leaves sleepers behind')
        book = self.BOOK.replace('BECOME', str(bool(become and ROOT)))
        play = self.new(self.plugin, book, hosts=many_hosts(3), timeout=30).start()
        try:
            wait_for(lambda: len(self.sleepers(play)) >= 3, 20, 'the sleepers do not start')
            interrupt(play)
        finally:
            play.finish()
        self.assertFalse(play.hung, 'hangs: ' + play.tail())
        self.assertNotEqual(play.rc, 0)
        self.assertEqual(play.status('never'), None)
        return play

    def sleepers(self, play):
        return [pid for pid in play.processes() if '62.5' in proc(pid, 'cmdline') and 'sleep' in proc(pid, 'comm')]

    def assert_clean(self, play, killed=False):
        left = [line for line in play.left_behind() if not (killed and ANSIBLES_OWN.search(line))]
        self.assertEqual(left, [], play.tail())

    @newest
    def test_odd_controllers(self):
        """Stock Ansible runs there, and so does the plugin."""
        self.needs_root()
        lines = {'few descriptors': 'ulimit -n 256; exec "$@"',
                 'no shared memory': 'exec unshare -m sh -c \'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"\' sh "$@"',
                 'full directory for temporary files': 'exec unshare -m sh -c \'mount -t tmpfs -o size=1m tmpfs t && '
                                                       '(dd if=/dev/zero of=t/fill bs=4k 2>/dev/null; exec "$@")\' sh "$@"'}
        for name, line in lines.items():
            with self.subTest(name):
                stock = self.oddly(self.stock, line)
                self.remove_control(stock)
                ours = self.oddly(self.plugin, line)
                self.assert_same(stock, ours)

    @newest
    def test_nobody_there(self):
        """Stock workers get into trouble without a stdin, and tell callbacks nothing when nobody reads."""
        self.needs_plugin()
        for name, line in {'no stdin': 'exec "$@" <&-', 'nobody reads': '{ "$@"; echo $? >&2; } | true'}.items():
            with self.subTest(name):
                play = self.oddly(self.plugin, line)
                self.assertEqual([play.status('file', 't%d' % n) for n in range(1, 9)], ['ok'] * 8, play.tail())
                self.assertTrue(play.rc == 0 and (name == 'no stdin' or play.err.endswith('120\n')), play.tail())

    def oddly(self, engine, line):
        """A play on eight hosts, started by a line of shell whose arguments are the command."""
        play = self.new(engine, WHO + '    - {name: copy, copy: {content: "x\\n", dest: "~/{{ inventory_hostname }}"}}\n'
                        '    - {name: file, file: {path: "~/{{ inventory_hostname }}", state: absent}}\n',
                        hosts=many_hosts(8), env={'ANSIBLE_PIPELINING': '1'})
        play.argv[:0] = ['sh', '-c', line, 'sh']
        play.run()
        self.assertFalse(play.hung, 'hangs: ' + play.tail())
        if engine is self.plugin:
            self.assertEqual(play.left_behind(), [], play.tail())
        return play

    @newest
    def test_ctrl_c(self):
        """The terminal sends it to the whole foreground group."""
        self.assert_clean(self.interrupted(lambda play: os.killpg(play.process.pid, signal.SIGINT)))

    def test_ctrl_c_with_become(self):
        self.assert_clean(self.interrupted(lambda play: os.killpg(play.process.pid,
                                                                  signal.SIGINT), become=True))

    @newest
    def test_ctrl_c_spares_what_was_left_running_before(self):
        """Also where it was the same process that started it."""
        self.needs_plugin('stock leaves sleepers behind')
        book = tasks('command: echo warm', 'command: echo warm',
                     '{name: daemon, shell: "sleep 61.5 > /dev/null 2>&1 & echo $! $PPID"}',
                     '{name: sleep, shell: "sleep 62.5 & sleep 62.5"}')
        play = self.new(self.plugin, book, timeout=30).start()
        try:
            wait_for(lambda: len(self.sleepers(play)) == 2, 20, 'the sleepers do not start')
            modules = {parent_of(parent_of(pid)) for pid in self.sleepers(play)}
            os.killpg(play.process.pid, signal.SIGINT)
        finally:
            play.finish()
        daemon, module = play.result('daemon')['stdout'].split()
        self.assertEqual(modules, {int(module)}, 'it is another process: this proves nothing')
        self.assertIn('61.5', proc(int(daemon), 'cmdline'))
        kill(int(daemon))
        self.assert_clean(play)

    @newest
    def test_ctrl_c_twice(self):
        def twice(play):
            os.killpg(play.process.pid, signal.SIGINT)
            time.sleep(0.1)
            if play.running():
                kill(play.process.pid, signal.SIGINT)
        self.assert_clean(self.interrupted(twice), killed=True)

    @newest
    def test_ctrl_c_at_any_moment(self):
        """While the broker starts, hosts are logged in to, items are on their way: it ends, with one word to the user."""
        self.needs_plugin('stock leaves sleepers behind')
        book = tasks('{name: lookup, debug: {msg: "{{ lookup(\'pipe\', \'sleep 0.2\') }}"}}',
                     '{name: loop, command: "echo {{ item }} {{ lookup(\'pipe\', \'sleep 0.1\') }}", loop: "{{ range(99) | list }}"}')
        for moment in range(8):
            with self.subTest(moment=moment):
                play = self.new(self.plugin, book, hosts=many_hosts(12), args=['-f', '12'], timeout=20).start()
                try:
                    wait_for(lambda: os.path.exists(play.env['MS_RECORD']), 15, 'the play does not start')
                    time.sleep(moment * 0.17)
                    os.killpg(play.process.pid, signal.SIGINT)
                finally:
                    play.finish()
                self.assertFalse(play.hung, 'hangs: ' + play.tail())
                self.assertEqual(play.rc, 99, play.tail())
                self.assertEqual(play.err.count('User interrupted execution'), 1, play.tail())
                self.assertNotIn('broker is gone', play.out + play.err)
                self.assert_clean(play)

    @newest
    def test_a_plugin_that_ends_its_process(self):
        """Which is a worker: Ansible gives the run up, says so, and leaves nothing behind."""
        book = tasks('{name: warm, command: echo warm}', '{name: ends, command: "echo {{ 3 | leave }}"}',
                     '{name: never, command: echo never}')
        files = {'filter_plugins/f.py': '''
            import os
            class FilterModule:
                def filters(self):
                    return {'leave': lambda code: os._exit(code)}
            '''}
        codes = set()
        for engine in (self.stock, self.plugin):
            play = self.new(engine, book, hosts=many_hosts(2), files=files, timeout=30).run()
            self.assertFalse(play.hung, 'hangs: ' + play.tail())
            self.assertEqual(play.status('never'), None, play.tail())
            self.assertIn('A worker was found in a dead state', play.out + play.err)
            codes.add(play.rc)
        self.assertEqual(len(codes), 1, codes)
        self.assert_clean(play)

    @newest
    def test_ctrl_c_while_a_filter_counts(self):
        """No worker waits for anything, and none comes to an end."""
        book = tasks('{name: warm, command: echo warm}', '{name: counts, command: "echo {{ \'started\' | count_up }}"}',
                     '{name: never, command: echo never}')
        files = {'filter_plugins/f.py': '''
            import itertools
            def count_up(path):
                open(path, 'w').close()
                return [number for number in itertools.count() if number < 0]
            class FilterModule:
                def filters(self):
                    return {'count_up': count_up}
            '''}
        for engine in (self.stock, self.plugin):
            play = self.new(engine, book, hosts=many_hosts(2), files=files, timeout=30).start()
            try:
                wait_for(lambda: os.path.exists(os.path.join(play.dir, 'started')), 20, 'the filter does not start')
                os.killpg(play.process.pid, signal.SIGINT)
            finally:
                play.finish()
            self.assertFalse(play.hung, 'hangs: ' + play.tail())
            self.assertEqual((play.rc, play.status('never')), (99, None), play.tail())
            self.assertIn('User interrupted execution', play.err)
        self.assert_clean(play)

    @newest
    def test_has_no_door(self):
        """No process of a run, on whichever side, has a socket that others can reach: none but Python's own, which is
        in a directory of the user's, and which stock Ansible has as well."""
        def look(play):
            sockets = {os.stat('/proc/%d/fd/%s' % (pid, fd)).st_ino: proc(pid, 'cmdline') for pid in play.processes()
                       for fd in os.listdir('/proc/%d/fd' % pid) if stat.S_ISSOCK(os.stat('/proc/%d/fd/%s' % (pid, fd)).st_mode)}
            self.assertGreater(len(sockets), 3)
            for name, is_door, inode in (('unix', lambda words: len(words) > 7 and '/pymp-' not in words[7], 6),
                                         ('tcp', lambda words: words[3] == '0A', 9), ('udp', bool, 9)):
                with open('/proc/net/' + name) as file:
                    doors = [line.split() for line in file.readlines()[1:]]
                found = [sockets[int(words[inode])] for words in doors if int(words[inode]) in sockets and is_door(words)]
                self.assertEqual(found, [], name)
            kill(play.process.pid, signal.SIGTERM)
        self.assert_clean(self.interrupted(look), killed=True)

    @newest
    def test_terminated(self):
        self.assert_clean(self.interrupted(lambda play: kill(play.process.pid, signal.SIGTERM)),
                          killed=True)

    @newest
    def test_killed(self):
        self.assert_clean(self.interrupted(lambda play: kill(play.process.pid)), killed=True)

    def test_killed_with_become(self):
        self.assert_clean(self.interrupted(lambda play: kill(play.process.pid), become=True), killed=True)

    @newest
    def test_killed_while_connecting(self):
        self.needs_plugin()
        with Silent() as port:
            play = self.new(self.plugin, WHO, hosts={'t1': {'ansible_port': port}}).start()
            time.sleep(2)
            kill(play.process.pid)
            play.finish()
            self.assert_clean(play, killed=True)

    @newest
    def test_hangup(self):
        self.assert_clean(self.interrupted(lambda play: os.killpg(play.process.pid, signal.SIGHUP)),
                          killed=True)

    @newest
    def test_background_job_of_a_task(self):
        """What a task starts in the background lives on in stock; with us as well."""
        self.needs_root()
        for engine in (self.stock, self.plugin):
            play = self.new(engine,
                            tasks('{name: start, shell: "nohup setsid sleep 63.5 >/dev/null 2>&1 &"}'),
                            env={
                'ANSIBLE_PIPELINING': '1'}).run()
            self.assertEqual(play.rc, 0, play.tail())
            time.sleep(1.5)
            alive = [pid for pid in play.processes() if '63.5' in proc(pid, 'cmdline')]
            play.clean()
            self.assertEqual(len(alive), 1, engine.name)

    @newest
    def test_file_descriptors_and_children(self):
        """Two hundred tasks in a row: the number of open files of no process grows."""
        self.needs_plugin()
        book = tasks('{command: echo x, loop: "{{ range(20) | list }}"}',
                     '{name: sleep, shell: sleep 1.5}',
                     '{command: echo x, loop: "{{ range(60) | list }}"}',
                     '{name: sleep again, shell: sleep 1.5}')
        play = self.new(self.plugin, book).start()
        counts = []
        for n in range(2):
            wait_for(lambda: [pid for pid in play.processes() if proc(pid,
                                                                      'cmdline') == 'sleep\x001.5\0'], 60,
                     'no sleep')
            counts.append({pid: len(os.listdir('/proc/%d/fd' % pid)) for pid in play.processes()
                           if os.path.isdir('/proc/%d/fd' % pid)})
            wait_for(lambda: not [pid for pid in play.processes() if proc(pid,
                                                                          'cmdline') == 'sleep\x001.5\0'],
                     10, 'sleeps')
        play.finish()
        self.assertEqual(play.rc, 0, play.tail())
        both = set(counts[0]) & set(counts[1])
        self.assertTrue(both)
        grown = {pid: (counts[0][pid], counts[1][pid]) for pid in both if counts[1][pid] > counts[0][pid] + 5}
        self.assertEqual(grown, {})


# 18 WORLD #######################################################################################
# The playbook by which the whole is judged: what people write, in one run, on every ansible-core.

WORLD_BOOK = '''
- name: prepare the local side
  hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - name: local directory
      file: {path: "{{ playbook_dir }}/built", state: directory}
    - name: local file
      copy: {content: "built here\\n", dest: "{{ playbook_dir }}/built/artifact.txt"}

- name: site
  hosts: all:!localhost
  vars:
    base: OUT
    app_users: [msapp, msapp2]
    release: "1.{{ minor }}"
    minor: 7
  handlers:
    - name: restart app
      command: "echo restarted by {{ ansible_facts.user_id }}"
    - name: reload app
      listen: app changed
      copy: {content: "reloaded\\n", dest: "{{ base }}/reloaded"}
  pre_tasks:
    - name: base directory
      file: {path: "{{ base }}", state: directory, mode: "0755"}
    - name: who am i
      command: id -un
      register: me
      changed_when: false
    - name: i am the login
      assert: {that: "me.stdout == 'LOGIN'"}
    - name: remember a fact
      set_fact: {tag: "{{ me.stdout }}-{{ release }}"}
  roles:
    - common
    - {role: web, web_port: 8080}
  tasks:
    - name: plain shell
      shell: echo out; echo err >&2; echo $((6 * 7))
      register: plain
    - name: show it
      debug: {var: plain.stdout_lines}
    - name: environment is ours
      shell: echo "$GREETING from $(basename $PWD)"
      args: {chdir: "{{ base }}"}
      environment: {GREETING: "hello 'quoted' \\"world\\""}
    - name: creates guard runs
      command: touch {{ base }}/once
      args: {creates: "{{ base }}/once"}
    - name: creates guard skips
      command: touch {{ base }}/once
      args: {creates: "{{ base }}/once"}
    - name: stdin reaches the command
      command: {argv: [cat], stdin: "one\\ntwo"}
    - name: skipped by a condition
      command: /bin/false
      when: release is version('2', '>=')
    - name: loop with labels
      command: echo {{ item.name }} {{ item.size }}
      loop: [{name: a, size: 1}, {name: b, size: 2}, {name: c, size: 3}]
      loop_control: {label: "{{ item.name }}", index_var: number}
      register: looped
    - name: loop over results
      debug: {msg: "{{ item.stdout }}"}
      loop: "{{ looped.results }}"
      loop_control: {label: "{{ item.stdout }}"}
    - name: loop with skips and changes
      file: {path: "{{ base }}/dir{{ item }}", state: directory}
      loop: [1, 2, 3, 2]
      when: item != 3
    - name: until succeeds
      shell: echo x >> {{ base }}/tries; test $(wc -l < {{ base }}/tries) -ge 3
      register: tried
      until: tried is succeeded
      retries: 5
      delay: 0
    - name: copy a file
      copy: {src: hello.txt, dest: "{{ base }}/hello.txt", mode: "0600"}
      notify: app changed
    - name: copy it again
      copy: {src: hello.txt, dest: "{{ base }}/hello.txt", mode: "0600"}
      notify: restart app
    - name: copy a tree
      copy: {src: tree/, dest: "{{ base }}/tree", mode: preserve}
    - name: copy content with backup
      copy: {content: "{{ item }}\\n", dest: "{{ base }}/backed", backup: true}
      loop: [first, second]
    - name: remote copy
      copy: {src: "{{ base }}/hello.txt", dest: "{{ base }}/hello2.txt", remote_src: true}
    - name: template in check mode
      template: {src: app.j2, dest: "{{ base }}/app.conf"}
      check_mode: true
      diff: true
    - name: template
      template: {src: app.j2, dest: "{{ base }}/app.conf", mode: "0640"}
      diff: true
      notify: [restart app, app changed]
    - name: line in file
      lineinfile: {path: "{{ base }}/app.conf", regexp: '^workers', line: workers = 9}
    - name: block in file
      blockinfile: {path: "{{ base }}/app.conf", block: "a = 1\\nb = 2"}
    - name: replace
      replace: {path: "{{ base }}/app.conf", regexp: 'tag = .*', replace: 'tag = changed'}
    - name: ini file stays stat
      stat: {path: "{{ base }}/app.conf"}
      register: conf
    - name: the stat is right
      assert: {that: [conf.stat.exists, conf.stat.mode == '0640']}
    - name: slurp
      slurp: {src: "{{ base }}/app.conf"}
      register: slurped
    - name: decode it
      debug: {msg: "{{ slurped.content | b64decode }}"}
    - name: fetch
      fetch: {src: "{{ base }}/app.conf", dest: fetched/, flat: false}
    - name: assemble parts
      assemble: {src: "{{ base }}/tree/parts", dest: "{{ base }}/assembled", remote_src: true}
    - name: symlink
      file: {src: "{{ base }}/hello.txt", dest: "{{ base }}/link", state: link}
    - name: find
      find: {paths: "{{ base }}", patterns: '*.txt'}
      register: found
    - name: count what was found
      debug: {msg: "{{ found.files | map(attribute='path') | sort }}"}
    - name: missing file fails and is ignored
      command: cat {{ base }}/no-such-file
      ignore_errors: true
      register: missing
    - name: failed when says so
      command: echo fine
      register: fine
      failed_when: "'fine' in fine.stdout"
      ignore_errors: true
    - name: changed when says no
      command: echo calm
      changed_when: false
    - name: flush here
      meta: flush_handlers
    - name: script from here
      script: greet.sh "some arg"
      register: greeted
    - name: raw command
      raw: echo raw as $(id -un)
    - name: asynchronous
      command: sleep 0.2
      async: 20
      poll: 1
    - name: secret
      command: echo very-secret
      no_log: true
    - name: delegated to the controller
      command: cat {{ playbook_dir }}/built/artifact.txt
      delegate_to: localhost
    - name: local action
      local_action: {module: stat, path: "{{ playbook_dir }}/built/artifact.txt"}
    - name: run once
      command: echo once
      run_once: true
    - name: include more
      include_tasks: more.yml
      vars: {flavour: sweet}
    - name: import more
      import_tasks: imported.yml
      tags: [imported]
    - name: own module
      own: {text: hello}
    - name: getent
      getent: {database: passwd, key: root}
    - name: trouble
      block:
        - name: before trouble
          command: echo before
        - name: fails
          command: sh -c 'echo broken >&2; exit 3'
        - name: never reached
          command: echo never
      rescue:
        - name: rescue it
          debug: {msg: "{{ ansible_failed_task.name }} {{ ansible_failed_result.rc }}"}
        - name: rescue remotely
          copy: {content: rescued, dest: "{{ base }}/rescued"}
      always:
        - name: always do
          command: echo always
    - name: facts again
      setup: {gather_subset: ["!all", "!min", "user"]}
BECOME
  post_tasks:
    - name: last
      command: hostname
      tags: [always]

- name: second play uses the same connection
  hosts: all:!localhost
  gather_facts: false
  tasks:
    - name: still here
      command: cat OUT/rescued
    - name: facts are kept
      debug: {msg: "{{ ansible_facts.user_id }} {{ tag }}"}
'''

WORLD_BECOME = '''
    - name: shared place
      file: {path: "{{ base }}/shared", state: directory, mode: "0777"}
    - name: become root
      command: id -un
      become: true
    - name: root writes
      copy: {content: "root was here\\n", dest: "{{ base }}/shared/root", mode: "0644"}
      become: true
      notify: restart app
    - name: become others
      command: id -un
      become: true
      become_user: "{{ item }}"
      loop: "{{ app_users }}"
    - name: an app writes
      copy: {src: hello.txt, dest: "{{ base }}/shared/app.txt", mode: "0640"}
      become: true
      become_user: msapp
    - name: another app templates
      template: {src: app.j2, dest: "{{ base }}/shared/app2.conf"}
      become: true
      become_user: msapp2
    - name: become by variable
      command: id -un
      vars: {ansible_become: true, ansible_become_user: msapp}
    - name: root changes owner
      file: {path: "{{ base }}/hello2.txt", owner: msapp, group: msapp, mode: "0604"}
      become: true
    - name: root in a block
      become: true
      block:
        - name: root sets a line
          lineinfile: {path: "{{ base }}/shared/root", line: "and again"}
        - name: root slurps
          slurp: {src: "{{ base }}/shared/app.txt"}
        - name: not root inside
          command: id -un
          become: false
'''

WORLD_FILES = {
    'files/hello.txt': 'hello, w\u00f6rld\n',
    'files/tree/a.sh': '#!/bin/sh\necho a\n',
    'files/tree/parts/1': 'one\n', 'files/tree/parts/2': 'two\n',
    'files/tree/deep/er/file': 'deep\n',
    'files/greet.sh': '#!/bin/sh\necho "greetings $1"\n',
    'templates/app.j2': 'host = {{ inventory_hostname }}\nworkers = {{ minor }}\n'
                        'tag = {{ tag }}\n{% for n in range(3) %}item{{ n }}\n{% endfor %}',
    'more.yml': '- name: included command\n  command: echo {{ flavour }} {{ item }}\n  loop: [1, 2]\n'
                '- name: included stat\n  stat: {path: /etc/hostname, get_checksum: false}\n',
    'imported.yml': '- name: imported command\n  command: uname -s\n  changed_when: false\n',
    'library/own.py': '''
        #!/usr/bin/python
        from ansible.module_utils.basic import AnsibleModule
        from ansible.module_utils.shout import shout
        module = AnsibleModule({'text': {'type': 'str'}}, supports_check_mode=True)
        module.exit_json(changed=False, said=shout(module.params['text']))
        ''',
    'module_utils/shout.py': 'def shout(text):\n    return text.upper() + "!"\n',
    'roles/common/tasks/main.yml': '''
        - name: common packages
          debug: {msg: "{{ common_packages | join(' ') }}"}
        - name: common directory
          file: {path: "{{ base }}/common", state: directory}
        - name: common files
          copy: {src: "{{ item }}", dest: "{{ base }}/common/{{ item }}"}
          loop: [x.conf, y.conf]
          notify: common changed
        - name: common check
          stat: {path: "{{ base }}/common/x.conf"}
          register: common_stat
        - name: common fact
          set_fact: {common_done: "{{ common_stat.stat.exists }}"}
        ''',
    'roles/common/handlers/main.yml': '- name: common changed\n  command: echo common\n',
    'roles/common/defaults/main.yml': 'common_packages: [vim, htop]\n',
    'roles/common/files/x.conf': 'x = 1\n',
    'roles/common/files/y.conf': 'y = 2\n',
    'roles/web/meta/main.yml': 'dependencies: []\n',
    'roles/web/vars/main.yml': 'server_name: "web-{{ web_port }}"\n',
    'roles/web/templates/site.j2': 'listen {{ web_port }};\nserver_name {{ server_name }};\n',
    'roles/web/library/webmod.py': '''
        #!/usr/bin/python
        from ansible.module_utils.basic import AnsibleModule
        module = AnsibleModule({'port': {'type': 'int'}})
        module.exit_json(changed=True, doubled=module.params['port'] * 2)
        ''',
    'roles/web/handlers/main.yml': '- name: web restarted\n  command: echo web\n',
    'roles/web/tasks/main.yml': '''
        - name: web directory
          file: {path: "{{ base }}/web", state: directory, mode: "0750"}
        - name: web site
          template: {src: site.j2, dest: "{{ base }}/web/site.conf"}
          notify: web restarted
        - name: web module of the role
          webmod: {port: "{{ web_port }}"}
        - name: web sites
          copy: {content: "site {{ item.key }} on {{ item.value }}\\n", dest: "{{ base }}/web/{{ item.key }}"}
          with_dict: {one: 1, two: 2}
        ''',
}


def world_book():
    """The playbook for this lab: without root it becomes nobody."""
    return (WORLD_BOOK.replace('BECOME', WORLD_BECOME if ROOT else '')
            .replace('OUT', '/home/mslab/out' if ROOT else LAB.path('out')).replace('LOGIN', LAB.login))


class RealWorld(Real):
    every_core = True

    def test_same_results_one_connection_one_sudo_per_account(self):
        sudos = {'root': 1, 'msapp': 1, 'msapp2': 1} if ROOT else {}
        book = world_book()
        self.assertGreaterEqual(len(re.findall('- name: ', book)), 60)
        if self.core in (NEWEST, OLDEST):
            stock, ours = self.compare(book, files=WORLD_FILES, logins={LAB.login: 1}, sudos=sudos)
            self.assertEqual(fetched_files(stock), fetched_files(ours))
        else:       # stock takes 45 s, and differs little from one of those
            ours = self.run_ours(book, files=WORLD_FILES)
            self.assertEqual(ours.rc, 0, ours.tail())
            self.assert_counts(ours, {LAB.login: 1}, sudos)


def fetched_files(play):
    return {path: mode_owner_content[3] for path, mode_owner_content
            in snapshot(os.path.join(play.dir, 'fetched')).items()}

# 19 PYTHONS #####################################################################################

class RealPythons(Real):
    """Every Python found, as the target of the ansible-core that still supports it."""

    every_core = TELLING_CORES

    def targets(self):
        """Those that this ansible-core supports; the middle ones on the newest core only."""
        found = pythons()
        oldest = by_version(TARGETS[self.core].split())[0]
        supported = [v for v in by_version(found) if by_version([v, oldest])[0] == oldest
                     and not ('3.0' <= v[:3] < '3.6' and len(v) == 3)]
        if self.core == OLDEST:
            supported = [v for v in supported if v in ('2.7', '3.6', '3.7')]
        elif self.core != NEWEST:
            supported = supported[:1]
        return {version: found[version] for version in supported}

    def test_targets(self):
        found = self.targets()
        if not found:
            self.skipTest('no Python that is a target of ansible-core %s' % self.core)
        hosts = {'py%s' % version.replace('.', '_'): dict(self_login(),
                                                          ansible_host='127.0.0.%d' % (20 + n),
                                                          ansible_python_interpreter=path)
                 for n, (version, path) in enumerate(found.items())}
        lines = ['setup: {gather_subset: ["!all", min]}', 'command: echo caf\u00e9',
                 '{name: s, shell: "echo err >&2; exit 2", ignore_errors: true}',
                 'file: {path: "BASE", state: directory}', 'copy: {src: bin, dest: "BASE/bin"}',
                 'template: {src: t.j2, dest: "BASE/t"}', 'lineinfile: {path: "BASE/t", line: more}',
                 'slurp: {src: "BASE/t"}',
                 'stat: {path: "BASE/bin"}', 'fetch: {src: "BASE/bin", dest: fetched/}',
                 '{probe: {do: surroundings}}',
                 '{probe: {do: crash}, ignore_errors: true}', '{probe: {do: unicode}}',
                 '{probe: {do: main_is_a_module}}', '{probe: {do: runs_commands}}',
                 'script: s.sh', 'raw: echo raw', '{command: "echo {{ item }}", loop: [1, 2]}',
                 '{command: sleep 0.1, async: 20, poll: 1}', 'file: {path: "BASE", state: absent}']
        files = {'library/probe.py': PROBE, 'files/bin': bytes(range(256)) * 1000,
                 'templates/t.j2': 'caf\u00e9 {{ 1 + 1 }}\n',
                 's.sh': '#!/bin/sh\necho script\n'}
        base = LAB.path('py') + '_{{ inventory_hostname }}'
        self.compare(tasks(*lines).replace('BASE', base), hosts=hosts, files=files, pipelining=True,
                     leftovers=False,
                     without=('exception', 'module_stderr', 'stderr', 'stderr_lines', 'ansible_facts',
                              'msg', 'child_pid', 'started'))


# 20 BENCH #######################################################################################
# Ratios, not times: the engines take turns, and every run starts without a living connection.

class Workload:
    """What to run and where: `delay` is the round trip of the link in seconds."""

    def __init__(self, about, book, hosts=1, delay=0, files=None, env=None, warm=False, become=False, beside=False,
                 memory=False):
        self.about = about
        self.book = book
        self.hosts = hosts
        self.delay = delay
        self.files = files or {}
        self.env = env or {}
        self.warm = warm                # one run beforehand that does not count
        self.beside = beside            # how long the items of the second host take beside the first one's
        self.memory = memory            # how much of it the controller takes at most


def repeated(count, task):
    return tasks(*[task] * count)


TIDY = ['{file: {path: /tmp/mitogen_single_bench, state: %s}}' % state for state in ('absent', 'directory')]
SMALL = {'files/small/%03d' % n: 'file %d\n' % n for n in range(100)}
NO_COMPRESSION = {'ANSIBLE_SSH_ARGS': '-o Compression=no -o ControlMaster=auto -o ControlPersist=60s'}
COPY_SMALL = '{copy: {src: "small/{{ \'%%03d\' %% item }}", dest: /tmp/mitogen_single_bench/}, loop: "{{ range(%d) | list }}"}'
COPY_BIG = '{copy: {src: "{{ lookup(\'env\', \'MS_BIG\') }}", dest: /tmp/mitogen_single_bench/big}}'
COPY_BESIDE = ('{copy: {src: "{{ item }}", dest: "/tmp/mitogen_single_bench/{{ inventory_hostname }}"}, '
               'loop: "{{ [lookup(\'env\', \'MS_BIG\')] if inventory_hostname == \'t1\' else '
               'range(10, 40) | map(\'regex_replace\', \'^\', \'small/0\') | list }}"}')
FETCH_BIG = tasks('{fetch: {src: "{{ lookup(\'env\', \'MS_BIG\') }}", dest: fetched}}')

WORKLOADS = {
    'empty': Workload('empty play', '- hosts: all\n  gather_facts: false\n  tasks: []\n'),
    'debug100': Workload('100 x debug', repeated(100, 'debug: {msg: hello}')),
    'command100': Workload('100 x command, 1 host', repeated(100, 'command: hostname')),
    'loop100': Workload('loop of 100 command',
                        tasks('{command: "echo {{ item }}", loop: "{{ range(100) | list }}"}')),
    'hosts10': Workload('20 x command, 10 hosts', repeated(20, 'command: hostname'), hosts=10),
    'hosts40': Workload('20 x command, 40 hosts', repeated(20, 'command: hostname'), hosts=40),
    'hosts200': Workload('5 x command, 200 hosts', repeated(5, 'command: hostname'), hosts=200, memory=True),
    'delay100': Workload('100 x command, 50 ms', repeated(100, 'command: hostname'), delay=0.05),
    'delayloop100': Workload('loop of 100 command, 50 ms', tasks(
        '{command: "echo {{ item }}", loop: "{{ range(100) | list }}"}'), delay=0.05),
    'copy100': Workload('copy of 100 small files', tasks(*TIDY, COPY_SMALL % 100), files=SMALL),
    'copy512': Workload('copy of 512 MiB, no compression', tasks(*TIDY, COPY_BIG), env=NO_COMPRESSION),
    'copy512C': Workload('copy of 512 MiB, default ssh_args', tasks(*TIDY, COPY_BIG)),
    'fetch512': Workload('fetch of 512 MiB, no compression', FETCH_BIG, env=NO_COMPRESSION),
    'fetch512C': Workload('fetch of 512 MiB, default ssh_args', FETCH_BIG),
    'delaycopy512': Workload('copy of 512 MiB, 50 ms, no compression', tasks(*TIDY, COPY_BIG), env=NO_COMPRESSION, delay=0.05),
    'beside': Workload('copy of small files beside one of 512 MiB to the same address', tasks(*TIDY, COPY_BESIDE), hosts=2,
                       files=SMALL, beside=True),
    'become': Workload('facts, 20 command, 10 lineinfile, become', (
        '- hosts: all\n  become: true\n  tasks:\n' + '    - command: id -un\n' * 20 +
        ''.join('    - lineinfile: {path: /tmp/mitogen_single_bench_lines, create: true, line: "line %d"}\n' % n
                for n in range(10)) + '    - file: {path: /tmp/mitogen_single_bench_lines, state: absent}\n')),
    'template50': Workload('template of 50 files', tasks(
        *TIDY, '{template: {src: t.j2, dest: "/tmp/mitogen_single_bench/{{ item }}"}, loop: "{{ range(50) | list }}"}'),
        files={'templates/t.j2': 'item {{ item }} of {{ inventory_hostname }}\n'}),
    'delaycopy30': Workload('copy of 30 small files, 50 ms', tasks(*TIDY, COPY_SMALL % 30),
                            files=SMALL, delay=0.05),
    'modules13': Workload('13 modules once each, second run', '', warm=True),
    'waiting40': Workload('lookup that sleeps for 1 s, 40 hosts', tasks(
        '{debug: {msg: "{{ lookup(\'pipe\', \'sleep 1\') }}"}}'), hosts=40),
    'heavy40': Workload('template of 0.3 s, 40 hosts', tasks(
        '{debug: {msg: "{{ range(6000) | map(\'string\') | join | length }}"}}'), hosts=40),
    'delegate10': Workload('10 hosts x sleep 1 delegated', tasks(
        '{command: sleep 1, delegate_to: localhost}'), hosts=10),
}


class Link:
    """The delaying proxy, a process of its own so that it takes no turn from anybody."""

    def __init__(self, delay):
        self.port = free_port()
        self.report = LAB.path('link.%d' % self.port)
        self.process = subprocess.Popen([sys.executable,
                                         os.path.abspath(__file__), 'proxy', str(self.port),
                                         str(LAB.port), str(delay / 2), self.report])
        wait_for(lambda: port_answers(self.port), 10, 'the proxy does not listen')

    def close(self):
        """{'up': bytes, 'down': bytes, 'trips': round trips}"""
        self.process.terminate()
        self.process.wait()
        with open(self.report) as file:
            return json.load(file)


class Pipe:
    """One connection through the proxy: each chunk leaves `delay` after it came, in order.

    A round trip is a burst from the client that follows a burst from the server.
    """

    def __init__(self, totals, delay):
        self.totals = totals
        self.delay = delay
        self.last = None            # the direction of the last chunk

    async def serve(self, reader, writer, port):
        there = await asyncio.open_connection('127.0.0.1', port)
        await asyncio.gather(self.carry('up', reader, there[1]), self.carry('down', there[0], writer))

    async def carry(self, direction, reader, writer):
        queue = asyncio.Queue(4096)
        sender = asyncio.ensure_future(self.send(queue, writer))
        data = True
        while data:
            try:
                data = await reader.read(65536)
            except OSError:
                data = b''
            if data:
                self.count(direction, len(data))
            await queue.put((asyncio.get_running_loop().time() + self.delay, data))
        await sender

    def count(self, direction, size):
        self.totals[direction] += size
        self.totals['trips'] += direction == 'up' and self.last == 'down'
        self.last = direction

    async def send(self, queue, writer):
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0, due - asyncio.get_running_loop().time()))
            try:
                if not data:
                    return writer.close()
                writer.write(data)
                await writer.drain()
            except OSError:
                return


def proxy(arguments):
    port, to, delay, report = int(arguments[0]), int(arguments[1]), float(arguments[2]), arguments[3]
    totals = {'up': 0, 'down': 0, 'trips': 0}

    def end(number, frame):
        with open(report, 'w') as file:
            json.dump(totals, file)
        os._exit(0)

    async def listen():
        server = await asyncio.start_server(
            lambda reader, writer: Pipe(totals, delay).serve(reader, writer, to), '127.0.0.1', port)
        async with server:
            await server.serve_forever()

    signal.signal(signal.SIGTERM, end)
    asyncio.run(listen())


def bench(arguments):
    parser = argparse.ArgumentParser(prog='test_single.py bench',
                                     description='stock, Mitogen and the plugin in turn')
    parser.add_argument('workloads', nargs='*', metavar='WORKLOAD', help=' '.join(WORKLOADS))
    parser.add_argument('--runs', type=int, default=3)
    parser.add_argument('--engines', default='stock,mitogen,plugin')
    options = parser.parse_args(arguments)
    unknown = set(options.workloads) - set(WORKLOADS)
    if unknown:
        parser.error('no such workload: %s' % ' '.join(sorted(unknown)))
    WORKLOADS['modules13'].book = THIRTEEN
    try:
        LAB.up()
    except unittest.SkipTest as reason:
        sys.exit(str(reason))
    engines = [Engine(name) for name in options.engines.split(',')]
    print('ansible-core %s, medians of %d runs, forks 20, pipelining and ControlPersist on' % (NEWEST, options.runs))
    for name in options.workloads or WORKLOADS:
        measure(name, engines, options.runs)
    return 0


def measure(name, engines, runs):
    workload = WORKLOADS[name]
    print('\n%s: %s' % (name, workload.about), flush=True)
    samples = {engine.name: [] for engine in engines}
    for turn in range(runs + workload.warm):
        for engine in engines:
            sample = bench_once(workload, engine)
            if turn >= workload.warm:
                samples[engine.name].append(sample)
    medians = {engine: {key: statistics.median(sample[key] for sample in taken) for key in taken[0]}
               for engine, taken in samples.items()}
    for engine, median in medians.items():
        print(bench_line(engine, median, medians), flush=True)


def bench_line(engine, median, medians):
    line = '  %-8s %7.2f s  %6.2f CPU s' % (engine, median['seconds'], median['cpu'])
    for other in ('stock', 'mitogen'):
        if other in medians and engine not in ('stock', other):
            line += '  %s / %s %5.2f' % (other, engine, medians[other]['seconds'] / median['seconds'])
    if 'item' in median:
        line += '  %d ms an item' % (1000 * median['item'])
    if 'up' in median:
        line += '  up %d kB, down %d kB, %d round trips' % (median['up'] / 1000, median['down'] / 1000,
                                                            median['trips'])
    if 'memory' in median:
        line += '  %d MB' % (median['memory'] / 1e6)
    return line


class MemoryWatch(threading.Thread):
    """The most that a play took, in a look every second: one takes 1 ms for each process."""

    def __init__(self, play):
        super().__init__(daemon=True)
        self.play = play
        self.peak = 0
        self.over = threading.Event()

    def run(self):
        while not self.over.wait(1):
            self.peak = max(self.peak, self.play.memory())


def bench_once(workload, engine):
    """One run on fresh connections; the engine's home is kept, and with it whatever it caches there."""
    link = Link(workload.delay) if workload.delay else None
    hosts = many_hosts(workload.hosts)
    for variables in hosts.values():
        variables['ansible_port'] = link.port if link else LAB.port
    env = {'ANSIBLE_PIPELINING': '1', 'ANSIBLE_FORKS': '20', 'ANSIBLE_CALLBACKS_ENABLED': None,
           'MS_BIG': big_file(workload)}
    if workload.beside:
        del env['ANSIBLE_CALLBACKS_ENABLED']
    if engine.name == 'plugin':
        env.update(ANSIBLE_STRATEGY=None, ANSIBLE_STRATEGY_PLUGINS=None,
                   ANSIBLE_CALLBACK_PLUGINS='plugins/callback:' + as_recommended())
    play = Play(engine, dict(workload.files, **{'play.yml': workload.book}), hosts,
                dict(env, **workload.env), ['play.yml'],
                timeout=900, home=LAB.path('bench_' + engine.name)).start()
    watch = MemoryWatch(play)
    if workload.memory:
        watch.start()
    play.finish()
    watch.over.set()
    sample = {'seconds': play.seconds, 'cpu': play.usage.ru_utime + play.usage.ru_stime}
    if workload.memory:
        sample['memory'] = watch.peak
    if workload.beside:
        moments = [event['at'] for event in play.events() if event['event'] == 'item_ok' and event['host'] == 't2']
        sample['item'] = statistics.median(later - at for at, later in zip(moments, moments[1:]))
    if play.rc:
        note('  %s failed\n%s' % (engine.name, play.tail()))
    settle(play)
    if link:
        sample.update(link.close())
    play.clean()
    return sample


def as_recommended():
    """A directory of callback plugins with a copy of the file, in the same place for all runs, as a user's is."""
    place = LAB.path('bench_callbacks')
    os.makedirs(place, exist_ok=True)
    shutil.copy2(PLUGIN, place)
    return place


def settle(play):
    """Let the processes of one run end before the next one starts its clock."""
    deadline = time.time() + 5
    while play.processes() and time.time() < deadline:
        time.sleep(0.05)


def big_file(workload):
    """512 MiB of random bytes, made once; None for a workload that does not need it."""
    if 'MS_BIG' not in workload.book:
        return None
    path = LAB.path('big')
    if not os.path.exists(path):
        with open(path, 'wb') as file:
            for n in range(512):
                file.write(os.urandom(1 << 20))
    return path


# 21 CONFORMANCE #################################################################################
# ansible-core's own integration targets, each by stock Ansible and by the plugin.  They change
# accounts, packages and files as they please: each runs in namespaces of its own, as root of an
# overlay of this machine that is kept in memory, with an sshd of its own, and all of it is gone
# afterwards.

SANDBOX = r'''
    set -e
    box=$1 config=$2 port=$3 folder=$4
    shift 4
    mount -t tmpfs sandbox "$box"
    for place in / $(findmnt -nro TARGET --real | grep -vx / | sort); do
        layer=$((layer + 1))
        mkdir -p "$box/$layer/upper" "$box/$layer/work" "$box/root"
        mount -t overlay -o "lowerdir=$place,upperdir=$box/$layer/upper,workdir=$box/$layer/work" \
            overlay "$box/root$place"
    done
    mount -t proc proc "$box/root/proc"
    mount --rbind /dev "$box/root/dev"
    mount --rbind /sys "$box/root/sys"
    mkdir -p "$box/root/root/.ssh"
    touch "$box/root/root/.ssh/authorized_keys"
    exec chroot "$box/root" sh -c '"$0" -f "$1" -p "$2" && cd "$3" && shift 3 && mkdir -m 777 /tmp/output && "$@"; exit $?' \
        "$(command -v sshd)" "$config" "$port" "$folder" "$@"
    '''

# What a target must not be marked with to be of use here.
FOREIGN = {'disabled', 'hidden', 'unstable', 'unsupported', 'needs/httptester', 'needs/privileged', 'skip/linux'}

# Those that start ansible-playbook on their host, and those that need root there without saying so.
LOCAL_TARGETS = ('connection_local connection_remote_is_local gather_facts-errors include_import_tasks_nested no_log '
                 'play_arg_spec roles var_reserved').split()
ROOT_TARGETS = 'connection_local facts_d remote_tmp'.split()

# As ansible-test sets them.
TARGET_SETTINGS = {
    'ANSIBLE_DEPRECATION_WARNINGS': 'false', 'ANSIBLE_DEVEL_WARNING': 'false',
    'ANSIBLE_FORCE_COLOR': 'false', 'ANSIBLE_FORCE_HANDLERS': 'true', 'ANSIBLE_HOST_KEY_CHECKING': 'false',
    'ANSIBLE_HOST_PATTERN_MISMATCH': 'error', 'ANSIBLE_INVENTORY': '/dev/null', 'ANSIBLE_LIBRARY': '/dev/null',
    'ANSIBLE_PYTHON_MODULE_RLIMIT_NOFILE': '1024', 'ANSIBLE_RETRY_FILES_ENABLED': 'false',
    'ANSIBLE_TEST_CI': '', 'ANSIBLE_TEST_COVERAGE': '', 'HOME': '/root', 'LANG': 'C.UTF-8', 'LOGNAME': 'root',
    'OUTPUT_DIR': '/tmp/output', 'PAGER': '/bin/cat', 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONPATH': '',
    'SHELL': '/bin/bash', 'TERM': 'xterm', 'USER': 'root'}
TARGET_SECONDS = 600


class Target:
    def __init__(self, suite, name):
        self.suite = suite
        self.name = name
        self.folder = os.path.join(suite, 'targets', name)
        path = os.path.join(self.folder, 'aliases')
        self.marks = set()
        if os.path.exists(path):
            with open(path) as file:
                self.marks = {line.split('#')[0].strip() for line in file}

    def fits(self):     # those of ansible-test itself need containers and the network
        return not (self.marks & FOREIGN or self.name.startswith('ansible-test')) and any(
            mark.startswith('shippable/posix/') for mark in self.marks)

    def run(self, engine):
        """-> whether it passed, seconds, path of what it printed"""
        log = os.path.join(CACHE, 'conformance', '%s.%s' % (self.name, engine.name))
        box = LAB.path('box')
        port = free_port()
        folder, argv = self.prepare(port)
        for place in (box, os.path.dirname(log)):
            os.makedirs(place, exist_ok=True)
        began = time.time()
        with open(log, 'wb') as file:
            try:
                code = subprocess.run(
                    ['unshare', '-mpfui', '--kill-child', 'sh', '-c', SANDBOX, 'sandbox', box, LAB.sshds[0].config,
                     str(port), folder] + argv, env=self.environment(engine, folder), stdin=subprocess.DEVNULL,
                    stdout=file, stderr=file, start_new_session=True, timeout=TARGET_SECONDS).returncode
            except subprocess.TimeoutExpired:
                code = 'it hangs'
        return code == 0, time.time() - began, log

    def prepare(self, port):
        """A target is a script or a role: write what it runs with, -> directory, command."""
        variables = dict(LAB.variables(), ansible_port=port, ansible_pipelining=True,
                         ansible_connection='local' if self.name in LOCAL_TARGETS else 'ssh',
                         ansible_become='needs/root' in self.marks or self.name in ROOT_TARGETS)
        play = {'hosts': 'testhost', 'gather_facts': 'gather_facts/no' not in self.marks, 'roles': [self.name],
                'vars': {'output_dir': '/tmp/output'}}
        host = ' '.join('%s=%s' % (key, json.dumps(value)) for key, value in variables.items())
        for name, text in (('inventory', '[testgroup]\ntesthost %s\n' % host), ('play.yml', json.dumps([play])),
                           ('empty.cfg', '')):
            with open(os.path.join(self.suite, name), 'w') as file:
                file.write(text)
        if os.path.exists(os.path.join(self.folder, 'runme.sh')):
            return self.folder, ['./runme.sh', '-v']
        return self.suite, ['ansible-playbook', 'play.yml', '-i', 'inventory', '-v']

    def environment(self, engine, folder):
        injector = os.path.join(self.suite, '../lib/ansible_test/_util/target/injector')
        path = '%s/bin:%s:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' % (engine.venv, injector)
        env = dict(TARGET_SETTINGS, PATH=path, ANSIBLE_PLAYBOOK_DIR=folder,
                   ANSIBLE_CONFIG=os.path.join(self.suite, 'empty.cfg'),
                   ANSIBLE_ROLES_PATH=os.path.join(self.suite, 'targets'),
                   ANSIBLE_TEST_PYTHON_INTERPRETER=os.path.join(engine.venv, 'bin/python'),
                   ANSIBLE_TEST_PYTHON_VERSION='3',
                   INVENTORY_PATH=os.path.join(self.suite, 'inventory'), **engine.environment())
        env.update(mark.split('/')[2:] for mark in self.marks if mark.startswith('env/set/'))
        return env


def fetch_targets(engine):
    """The directory with the integration targets of an engine's ansible-core, out of its sdist."""
    python = os.path.join(engine.venv, 'bin', 'python')
    version = sh(python, '-c', 'from ansible import release; print(release.__version__)').strip()
    path = os.path.join(CACHE, 'ansible-core-' + version)
    if not os.path.exists(path):
        os.makedirs(CACHE, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            sh(python, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '-d', scratch,
               'ansible-core==' + version)
            sh('tar', 'xzf', glob.glob(scratch + '/*.tar.gz')[0], '-C', scratch, '--no-same-owner')
            for script in glob.glob(scratch + '/*/test/lib/ansible_test/_util/target/injector/*'):
                os.chmod(script, 0o755)
            os.rename(glob.glob(scratch + '/*/test')[0], path)
    return os.path.join(path, 'integration')


def conformance(arguments):
    parser = argparse.ArgumentParser(prog='test_single.py conformance',
                                     description="ansible-core's own integration targets, by stock and by the plugin")
    parser.add_argument('targets', nargs='*', metavar='TARGET', help='all that fit take two hours')
    options = parser.parse_args(arguments)
    if not ROOT:
        sys.exit('root is needed: targets run on an overlay of this machine')
    try:
        LAB.up()
    except unittest.SkipTest as reason:
        sys.exit(str(reason))
    engines = Engine('stock'), Everywhere('plugin')
    suite = fetch_targets(engines[0])
    names = sorted(os.listdir(os.path.join(suite, 'targets')))
    if set(options.targets) - set(names):
        parser.error('no such target: %s' % ' '.join(sorted(set(options.targets) - set(names))))
    targets = [Target(suite, name) for name in options.targets or names]
    passed = {engine.name: set() for engine in engines}
    print('%-40s%20s%20s' % ('', *passed))
    for target in targets:
        if options.targets or target.fits():
            print('%-40s' % target.name, end='', flush=True)
            for engine in engines:
                is_passed, seconds, log = target.run(engine)
                passed[engine.name] |= {target.name} if is_passed else set()
                print('%8s %9.1f s' % ('passed' if is_passed else 'FAILED', seconds), end='', flush=True)
            print('' if is_passed or target.name not in passed['stock'] else '  ' + log, flush=True)
    lost = passed['stock'] - passed['plugin']
    print('stock passes %d, the plugin %d of these' % (len(passed['stock']), len(passed['stock'] - lost)))
    return 1 if lost else 0


# 22 PLAYBOOKS ###################################################################################
# Playbooks that others wrote: those of DebOps, each by stock Ansible and by the plugin, on a Debian that is made for
# that one run and thrown away.  Compared are the results of all tasks and items, the recap, and every file that the
# playbook wrote.

DEBOPS = 'debops==3.3.2', 'dnspython', 'netaddr', 'passlib', 'pyopenssl'
DEBIAN = 'bookworm'
DEBIAN_PACKAGES = ('ca-certificates cron dbus git gnupg iproute2 kmod less libcap2-bin locales lsb-release netbase '
                   'openssh-server procps python3 python3-apt rsync sudo')

# A machine: the files of the tree and above them its own, in memory. It shares the network with this one, for packages,
# and its services listen there as long as it lasts; but nothing else, and it has no more rights than a container of
# Docker's, so that what it mounts, loads or sets fails.
MACHINE = r'''
    set -e
    box=$1 tree=$2 lab=$3 port=$4
    mount -t tmpfs machine "$box"
    mkdir "$box/upper" "$box/work" "$box/root"
    mount -t overlay -o "lowerdir=$tree,upperdir=$box/upper,workdir=$box/work" overlay "$box/root"
    cd "$box/root"
    mount -t proc proc proc
    for place in proc/sys proc/sysrq-trigger; do [ ! -e $place ] || mount -o bind,ro $place $place; done
    mount -t sysfs -o ro sysfs sys
    mount -t tmpfs -o mode=755 run run
    mount -t tmpfs -o mode=755 dev dev
    mkdir dev/pts dev/shm run/lock run/sshd run/lab
    chmod 1777 dev/shm run/lock
    mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
    cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty dev
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    cp "$lab/host_key" "$lab/authorized_keys" "$lab/machine_config" run/lab
    cp -L /etc/resolv.conf etc
    hostname machine
    rights=+chown,+dac_override,+fowner,+fsetid,+kill,+mknod,+net_raw,+setfcap,+setgid,+setpcap,+setuid
    exec setpriv --bounding-set="-all,$rights,+audit_write,+net_bind_service,+sys_chroot" \
        chroot . sh -c '/usr/sbin/sshd -D -e -f /run/lab/machine_config -p "$0"; exit $?' "$port"
    '''

PLAYBOOK_SECONDS = 1200

# What no two runs of stock Ansible leave alike.
VARYING = re.compile('|'.join((
    r'(tmp|var/(tmp|log|cache))(/|$)',                          # what comes and goes, and says when
    r'(root|home/debian)/\.ansible(/|$)',                       # with become, the plugin uses root's
    r'var/lib/(apt|systemd|ucf)/|var/lib/dpkg/(lock|triggers)', # when packages came
    r'etc/(machine-id|aliases\.db|ssh/ssh_host_.*)$|etc/ssl/.*/ssl-cert-snakeoil', # drawn by lot
    r'.*(\.pyc|\.git/index|\.gnupg/(pubring.kbx|trustdb.gpg))$', # the time of files, or of the day
)))

# Of what Ansible reports: the time of day; what is said once in a process, be that a worker or all of the play (which
# variable is deprecated, ..); and that a module had to make root's ~/.ansible/tmp.
UNTOLD = {'cache_update_time', 'deprecations', 'warnings'}
APT_FETCHED = re.compile(r'(?m)^Fetched .*')

# What DebOps would draw by lot or take from the clock, and where its secrets go: beside the inventory.
MOMENT = '2020-02-02T02:02:02'
DEBOPS_SETTINGS = {
    'inventory__environment': {'GIT_AUTHOR_DATE': MOMENT, 'GIT_COMMITTER_DATE': MOMENT}, 'secret__levels': '',
    'cron__crontab_offset_seeds': list('abcdefghijkl'), 'atd_batch_multiplier': '1', 'atd_batch_interval': '60',
    'root_account__generate_ssh_key': False, 'root_account__password': '', 'nginx_welcome_template': '/etc/hostname',
    'sshd__version': '9.2'}

# Not those that need a systemd (rsyslog, networkd, timesyncd, ..), the kernel (sysctl, lvm, ferm, dnsmasq, ..),
# software from elsewhere than Debian (gitlab, elasticsearch, ..), or make keys or passwords (rsnapshot, pki, ..).
PLAYBOOKS = '''
    apt apt_install apt_listchanges apt_mark apt_preferences apt_proxy atd auth authorized_keys console cron debconf
    debops_fact environment etc_aliases etc_services etckeeper extrepo fhs gitusers golang keyring libuser locales
    logrotate machine mariadb nodejs nsswitch pam_access php postgresql proc_hidepid python resolvconf resources
    root_account ruby sudo sysnews system_groups tcpwrappers tzdata unattended_upgrades users yadm
    memcached nginx postfix sshd stunnel'''.split()


class Machine:
    """A fresh Debian with an sshd on a port of its own, for as long as the `with` lasts."""

    def __enter__(self):
        self.box = LAB.path('machine')
        self.port = free_port()
        os.makedirs(self.box, exist_ok=True)
        with open(LAB.path('sshd.log'), 'ab') as log:
            self.process = subprocess.Popen(
                ['setpriv', '--pdeathsig', 'KILL', 'unshare', '-mpfui', '--kill-child', 'sh', '-c', MACHINE, 'machine',
                 self.box, debian_tree(), LAB.root, str(self.port)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        try:
            wait_for(lambda: port_answers(self.port), 20, 'the machine does not come up')
        except RuntimeError:
            note(LAB.read('sshd.log')[-2000:])
            raise
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def files(self):
        """{path: (mode, owner, group, hash or target, text)} of all that is not as it was at the start."""
        top = '/proc/%d/root%s/upper' % (self.process.pid, self.box)
        return {path: what + (text_of(os.path.join(top, path)),) for path, what in snapshot(top).items()
                if not VARYING.match(path) and what != entry(os.path.join(debian_tree(), path))}


def text_of(path):
    """What a report can show of a file."""
    try:
        with open(path, encoding='utf-8') as file:
            return file.read(50000)
    except (OSError, ValueError):
        return ''


def debian_tree():
    """The files that all machines have in common, made once."""
    tree = os.path.join(CACHE, DEBIAN)
    if not os.path.exists(tree):
        install_packages({'debootstrap': 'debootstrap'})
        note('making a Debian: %s' % tree)
        new = tree + '.new'
        shutil.rmtree(new, ignore_errors=True)
        sh('debootstrap', '--variant=minbase', '--include=' + DEBIAN_PACKAGES.replace(' ', ','), DEBIAN, new,
           debian_mirror())
        sh('chroot', new, 'useradd', '-m', '-p', '*', '-s', '/bin/bash', LAB.login)
        sh('chroot', new, 'debconf-set-selections', input=b'man-db man-db/auto-update boolean false\n')
        for name, text in (('hosts', '127.0.0.1 localhost\n127.0.1.1 machine.example.org machine\n'),
                           ('apt/apt.conf.d/lab', 'APT::Install-Recommends "false";\n'),    # compilers, for one
                           ('sudoers.d/lab', '%s ALL=(ALL) NOPASSWD: ALL\n' % LAB.login)):
            with open(os.path.join(new, 'etc', name), 'w') as file:
                file.write(text)
        os.rename(new, tree)
    return tree


def debian_mirror():
    """The one that this machine takes its own packages from."""
    sources = glob.glob('/etc/apt/sources.list') + glob.glob('/etc/apt/sources.list.d/*')
    found = re.findall(r'\bhttps?://\S+/debian/?(?=\s)', ''.join(open(path).read() for path in sources))
    return found[0] if found else 'http://deb.debian.org/debian'


def debops():
    """The directory with DebOps and the libraries that its plugins need."""
    path = os.path.join(CACHE, 'debops')
    if not os.path.exists(path):
        note('fetching DebOps: %s' % path)
        sh(os.path.join(venv(NEWEST), 'bin', 'pip'), 'install', '-q', '--no-deps', '--target', path + '.new', *DEBOPS)
        os.rename(path + '.new', path)
    return os.path.join(path, 'debops/_data/ansible/collections')


def run_playbook(engine, path):
    """-> the play, and the files that it wrote"""
    with open(path) as file:
        groups = re.findall(r'\bdebops_(?:all_hosts|service_\w+)', file.read())
    with Machine() as machine:
        variables = dict(LAB.variables(), ansible_port=machine.port, **DEBOPS_SETTINGS)
        play = Play(engine, args=[path], timeout=PLAYBOOK_SECONDS,
                    hosts=json.dumps({group: {'hosts': {'machine': variables}} for group in groups}),
                    env={'ANSIBLE_COLLECTIONS_PATH': '%s:%s' % (debops(), collections_path()),
                         'ANSIBLE_PIPELINING': '1',
                         'ANSIBLE_ALLOW_BROKEN_CONDITIONALS': '1',       # as all ansible-cores before 2.19 did
                         'PYTHONHASHSEED': '0',                          # lists that are made of sets
                         'PYTHONPATH': os.path.join(CACHE, 'debops')})
        try:
            play.run()
        except KeyboardInterrupt:       # workers have sessions of their own: the play knows them
            play.process.send_signal(signal.SIGINT)
            play.process.wait(20)
            raise
        return play, machine.files()


def told(value):
    """What a play reported of each task and item, in order, without what it draws by lot or reads off a clock."""
    if isinstance(value, Play):
        return told(story(value))
    if isinstance(value, dict):
        return {key: told(item) for key, item in value.items() if key not in UNTOLD}
    if isinstance(value, (list, tuple)):
        return type(value)(told(item) for item in value)
    return APT_FETCHED.sub('', value) if isinstance(value, str) else value


def file_differences(stock, ours):
    lines = []
    for path in sorted({*stock, *ours}):
        *stock_entry, stock_text = stock.get(path, (None, ''))
        *our_entry, our_text = ours.get(path, (None, ''))
        if stock_entry != our_entry:
            lines += ['%s: stock %s, plugin %s' % (path, stock_entry, our_entry)]
            lines += difflib.unified_diff(stock_text.splitlines(), our_text.splitlines(), lineterm='', n=0)
    return lines


def compare_playbook(path):
    """Print a line about it, -> whether the engines differ."""
    name = os.path.basename(path)[:-len('.yml')]
    print('%-24s' % name, end='', flush=True)
    (stock, files), (ours, our_files) = [run_playbook(Engine(engine), path) for engine in ('stock', ENGINE)]
    lines = differences(told(stock), told(ours)) + file_differences(files, our_files)
    if stock.rc != ours.rc:
        lines.append('exit code: stock %s, plugin %s' % (stock.rc, ours.rc))
    commands = [sum(play.sessions().values()) for play in (stock, ours)]
    if ENGINE == 'plugin' and commands[1] > max(1, commands[0] / 4):
        lines.append('the plugin does not carry it: %d commands over ssh, stock %d' % (commands[1], commands[0]))
    report = os.path.join(CACHE, 'playbooks', name)
    os.makedirs(os.path.dirname(report), exist_ok=True)
    with open(report, 'w') as file:
        file.write('\n'.join(lines + ['', stock.tail(), ours.tail()]))
    tasks = sum(event['event'] == 'runner_start' for event in stock.events())
    print('%8.1f s%8.1f s%7.1f%7d  %s%s' % (
        stock.seconds, ours.seconds, stock.seconds / ours.seconds, tasks, 'DIFFERS ' + report if lines else 'same',
        ', both fail' * bool(stock.rc and ours.rc)), flush=True)
    for play in (stock, ours):
        shutil.rmtree(play.dir)
    return bool(lines)


def playbooks(arguments):
    parser = argparse.ArgumentParser(prog='test_single.py playbooks',
                                     description='playbooks of DebOps, by stock and by the plugin')
    parser.add_argument('names', nargs='*', metavar='GLOB', help='names of service playbooks')
    options = parser.parse_args(arguments)
    if not ROOT:
        sys.exit('root is needed: the machines are overlays in namespaces')
    install_packages({'sshd': 'openssh-server', 'ssh': 'openssh-client'})
    LAB.make_root('debian')
    LAB.write('sudo.log', '')
    LAB.write('machine_config', SSHD_CONFIG % {'root': '/run/lab', 'port': 22, 'passwords': 'no'})
    folder = os.path.join(debops(), 'ansible_collections/debops/debops/playbooks/service')
    debian_tree()
    paths = [path for name in options.names or PLAYBOOKS for path in sorted(glob.glob('%s/%s.yml' % (folder, name)))]
    print('%-24s%10s%10s%7s%7s' % ('', 'stock', 'plugin', 'ratio', 'tasks'))
    different = sum([compare_playbook(path) for path in paths])
    print('%d playbooks, %d differ' % (len(paths), different))
    return 1 if different or not paths else 0


# 23 MAIN ########################################################################################

class Result(unittest.TextTestResult):
    """Counts passes, and says each reason for a skip in a line of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passed = 0
        self.durations = []

    def getDescription(self, test):
        return test.id().replace('__main__.', '')

    def startTest(self, test):
        self.began = time.time()
        super().startTest(test)

    def stopTest(self, test):
        self.durations.append((time.time() - self.began, self.getDescription(test)))
        super().stopTest(test)

    def addSuccess(self, test):
        self.passed += 1
        super().addSuccess(test)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        if os.environ.get('CI') == 'true' and not reason.startswith(EXPLAINED):
            self.failures.append((test, 'skipped without an accepted reason: %s' % reason))

    # A long run says at once all that is known of what went wrong, and at the end where and what.

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.stream.writeln(self.failures[-1][1])

    def addError(self, test, error):
        super().addError(test, error)
        self.stream.writeln(self.errors[-1][1])

    def addSubTest(self, test, subtest, error):
        before = len(self.failures) + len(self.errors)
        super().addSubTest(test, subtest, error)
        if error is not None and len(self.failures) + len(self.errors) > before:
            kind = self.failures if issubclass(error[0], test.failureException) else self.errors
            self.stream.writeln(kind[-1][1])

    def printErrors(self):
        self.stream.writeln()
        for kind, tests in (('FAIL', self.failures), ('ERROR', self.errors)):
            for test, text in tests:
                self.stream.writeln('%s: %s: %s' % (kind, self.getDescription(test), essence(text)))
        for test, reason in self.skipped:
            note('skipped %s: %s' % (self.getDescription(test), reason))
        for seconds, name in sorted(self.durations, reverse=True)[:5]:
            note('%6.1f s  %s' % (seconds, name))
        classes = collections.Counter()
        for seconds, name in self.durations:
            classes[name.split('.')[0]] += seconds
        note('seconds: ' + ', '.join('%s %d' % pair for pair in classes.most_common()))


def essence(text):
    """The error at the end of a traceback, without the long comparison that may follow it."""
    return (re.findall(r'^[\w.]+(?:Error|Exception|Interrupt|Expired): .*', text, re.M) or text.splitlines()[-1:])[-1][:300]


def matrix_classes():
    """For every class with `every_core`, one more class for each older ansible-core, or for those that it names."""
    made = {}
    for name, value in list(globals().items()):
        if isinstance(value, type) and issubclass(value, Real) and value.every_core:
            for core in by_version(CORES if value.every_core is True else value.every_core):
                if core != NEWEST:
                    twin = '%s_%s' % (name, core.replace('.', '_'))
                    hidden = {test: None for test in dir(value) if hasattr(getattr(value, test), 'newest_only')}
                    made[twin] = type(twin, (value,),
                                      dict(hidden, core=core, __module__=value.__module__))
    return made


def the_suite(options):
    module = sys.modules[__name__]
    if options.matrix:
        vars(module).update(matrix_classes())
    loader = unittest.TestLoader()
    if options.pattern:
        loader.testNamePatterns = ['*%s*' % pattern if '*' not in pattern else pattern
                                   for pattern in options.pattern]
    if options.names:
        return loader.loadTestsFromNames(options.names, module)
    return loader.loadTestsFromModule(module)


def run_tests(arguments):
    parser = argparse.ArgumentParser(description='the tests of mitogen_single.py')
    parser.add_argument('names', nargs='*', help='Class or Class.test_name')
    parser.add_argument('-k', dest='pattern', action='append', help='only tests whose name matches')
    parser.add_argument('--matrix', action='store_true', help='also on the older ansible-cores')
    parser.add_argument('--slow', action='store_true', help='also those that take gigabytes, hours or the network')
    parser.add_argument('-f', '--failfast', action='store_true')
    parser.add_argument('-q', '--quiet', action='store_true')
    options = parser.parse_args(arguments)
    if options.slow:
        os.environ['MITOGEN_SINGLE_TEST_SLOW'] = '1'
    runner = unittest.TextTestRunner(verbosity=1 if options.quiet else 2, resultclass=Result,
                                     failfast=options.failfast)
    result = runner.run(the_suite(options))
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    print('%d passed, %d failed, %d skipped' % (result.passed, failed, len(result.skipped)), flush=True)
    return 1 if failed or not (result.passed or result.skipped) else 0


def main(arguments):
    # Whoever started us may have ignored them (nohup, a shell's &); the plays that get them must not.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As Ctrl-C, and not as SystemExit, which unittest takes for the failure of one test.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    commands = {'bench': bench, 'conformance': conformance, 'playbooks': playbooks, 'proxy': proxy}
    command = commands.get(arguments[0]) if arguments else None
    try:
        return command(arguments[1:]) if command else run_tests(arguments)
    except KeyboardInterrupt:
        return 130
    finally:
        LAB.down()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
