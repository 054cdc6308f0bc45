/* Process 1 until the machine's own files are there: modules in, the host's root below a file
 * system in memory, then what the kernel's command line names after "--": a working directory and
 * a command. Everything that may fail is fatal: the kernel panics, and the runner shows why. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void must(int result, const char *what)
{
	if (result >= 0)
		return;
	fprintf(stderr, "init: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void mounted(const char *what, const char *where, const char *type, unsigned long flags,
		    const char *options)
{
	mkdir(where, 0755);
	must(mount(what, where, type, flags, options), where);
}

int main(int count, char **arguments)
{
	char path[32];

	(void)count;
	for (int number = 0;; number++) {
		snprintf(path, sizeof(path), "/modules/%d", number);
		int module = open(path, O_RDONLY | O_CLOEXEC);
		if (module < 0)
			break;
		must(syscall(SYS_finit_module, module, "", 0), path);
		close(module);
	}
	mounted("host", "/host", "9p", MS_RDONLY,
		"trans=virtio,version=9p2000.L,cache=loose,msize=262144");
	mounted("memory", "/memory", "tmpfs", 0, "");
	mkdir("/memory/upper", 0755);
	mkdir("/memory/work", 0755);
	mounted("root", "/root", "overlay", 0,
		"lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work");
	must(mount("dev", "/root/dev", "devtmpfs", 0, ""), "/dev");
	must(chdir("/root"), "/root");
	must(mount(".", "/", NULL, MS_MOVE, NULL), "moving the root");
	must(chroot("."), "chroot");
	must(chdir(arguments[1]), arguments[1]);
	must(execv(arguments[2], arguments + 2), arguments[2]);
}
